"""Train many LoRA adapters at once on one shared base model."""
