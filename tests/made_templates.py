"""Chat templates, written for these tests, that do to a conversation what those of well-known models do.

`LAYOUTS[name] = (template, control tokens, BOS)`. What each is like:
    llama3: BOS; a system turn that is always there and holds today's date; trims every turn.
    qwen2.5: a system turn by default.
    qwen3: an empty <think> block before the last answer, and in the prompt where thinking is off; earlier answers are
        without.
    gemma3: BOS; the assistant is called model; trims; refuses two turns of the same role in a row.
    phi3: EOS after the last answer, beside the mark that ends every answer, and both begin alike.
    phi4: role and text separated by a mark.
    mistral: brackets around questions, EOS after answers, a space before them; refuses two questions in a row.
    smollm2: a system turn by default, other words.
    smollm3: today's date in the system turn; an empty <think> block before every answer where thinking is off.
"""

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)

LAYOUTS = {
    "llama3": (
        "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday: {{ strftime_now('%d %b %Y') }}<|eot_id|>"
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>",
    ),
    "qwen2.5": (DEFAULT_SYSTEM + CHATML + CHATML_PROMPT, CHATML_TOKENS, None),
    "qwen3": (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% set parts = m.content.split('</think>') %}{% if loop.index0 > ns.last %}<think>\n"
        "{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' }}\n</think>\n\n{% endif %}"
        "{{ parts[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        + CHATML_PROMPT.replace(
            "{% endif %}",
            "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        ),
        [*CHATML_TOKENS, "<think>", "</think>"],
        None,
    ),
    "gemma3": (
        "{{ bos_token }}" + ALTERNATE + "{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ["<start_of_turn>", "<end_of_turn>"],
        "<bos>",
    ),
    "phi3": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ["<|user|>", "<|assistant|>", "<|end|>"],
        None,
    ),
    "phi4": (
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        [*CHATML_TOKENS, "<|im_sep|>"],
        None,
    ),
    "mistral": (
        "{{ bos_token }}" + ALTERNATE + "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
        "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}",
        ["[INST]", "[/INST]"],
        "<s>",
    ),
    "smollm2": (DEFAULT_SYSTEM.replace("kind", "brief") + CHATML + CHATML_PROMPT, CHATML_TOKENS, None),
    "smollm3": (
        "<|im_start|>system\nToday: {{ strftime_now('%d %B %Y') }}<|im_end|>\n"
        "{% set quiet = '<think>\n\n</think>\n' if enable_thinking is defined and not enable_thinking else '' %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{{ quiet }}"
        "{{ m.content.lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{{ quiet }}{% endif %}",
        CHATML_TOKENS,
        None,
    ),
}
