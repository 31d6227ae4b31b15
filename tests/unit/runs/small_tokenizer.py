"""A small byte-level tokenizer of our own, with a chat template."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|end|>", "<|begin|>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["reverse the word abc and give cba", "user assistant system", "one two three four"] * 20


def make_tokenizer(*, adds_bos: bool = False, template: str | None = CHATML):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A",
            special_tokens=[("<|begin|>", core.token_to_id("<|begin|>"))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        bos_token="<|begin|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=template,
    )
