"""Chat templates that do something else than add turn behind turn, each as small as its manner."""

# Closes a whole conversation with a token of its own (Phi-3).
CLOSING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
# Puts a thought, though an empty one, in front of the last answer only; asked without thinking, it
# writes the empty thought itself (Qwen3).
THINKING = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% set thought, said = '', m.content %}"
    "{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ said }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
# Opens a thought when it asks, and shows answers without one (DeepSeek-R1).
OPENING = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|begin|>{{ m.content.split('</think>')[-1] }}<|end|>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|begin|><think>\n{% endif %}"
)
# Puts the system's text into the last question (Mistral).
SYSTEM_LAST = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if system else messages %}"
    "<|begin|>{% for m in turns %}{% if m.role == 'user' %}[INST] "
    "{% set before = 1 if add_generation_prompt else 2 %}"
    "{% if system and loop.index0 == turns | length - before %}{{ system + '\n\n' }}{% endif %}"
    "{{ m.content }} [/INST]"
    "{% else %} {{ m.content }}<|end|>{% endif %}{% endfor %}"
)
# Ends the last turn with another token than those before (gpt-oss).
ENDS_OTHERWISE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}"
    "{{ '<|end|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)
# Only markers of roles, which end the turn before them (GLM-4).
MARKERS = (
    "<|begin|>{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# No turn of the system, and other names for the roles (Gemma).
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}<|begin|>{% for m in messages %}<|im_start|>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
# Marks what is learned together with the header that it is asked with (SmolLM3).
MARKS_THE_HEADER = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "<|im_start|>assistant\n{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Marks the content without what ends the turn.
MARKS_NO_END = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Tools, calls and their results (Qwen2.5, Hermes).
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ prefix or '' }}{% endif %}"
)
