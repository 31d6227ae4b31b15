"""These literals name the forms of a base's weights, and how PEFT can be told of a layer."""

from typing import Literal, get_args

# Weights of linear layers as 4-bit NormalFloat or 8-bit integer codes, in blocks with a scale each.
Quantization = Literal["nf4", "int8"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

# PEFT can be told of a linear layer: by its leaf name with all layers of that ending, by its
# full name alone (other modules end so too), by a regular expression (others end in its full name),
# by its weight as a parameter (PEFT rewrites targets of that name), or not at all (PEFT looks for
# its factors under a name that it makes of this one).
Naming = Literal["leaf", "full", "pattern", "parameter", "lost"]
