"""Chat templates in the formats of eight model families, and the same dialogue as each writes it, marked by hand.

In `SAID` the learned tokens stand between « and »; those marks are not part of the text.
"""

DIALOGUE = (
    ("user", "What is two plus two?"),
    ("assistant", "It is four."),
    ("user", "And three?"),
    ("assistant", "Six"),
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>' + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + '</s>' }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}{% else %}{{ m['content'] + '</s>' }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ '<bos>' }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# name: template, special tokens, the one that ends a turn, and what is to come out: an example a string
SAID: dict[str, tuple[str, tuple[str, ...], str, tuple[str, ...]]] = {
    "chatml": (
        CHATML,
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        (
            (
                "<|im_start|>user\nWhat is two plus two?<|im_end|>\n<|im_start|>assistant\n«It is four.<|im_end|>»\n"
                "<|im_start|>user\nAnd three?<|im_end|>\n<|im_start|>assistant\n«Six<|im_end|>»\n"
            ),
        ),
    ),
    "llama3": (
        LLAMA3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        (
            (
                "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is two plus two?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n«It is four.<|eot_id|>»"
                "<|start_header_id|>user<|end_header_id|>\n\nAnd three?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n«Six<|eot_id|>»"
            ),
        ),
    ),
    "llama2": (
        LLAMA2,
        ("<s>", "</s>"),
        "</s>",
        ("<s>[INST] What is two plus two? [/INST]« It is four. </s>»<s>[INST] And three? [/INST]« Six </s>»",),
    ),
    "mistral": (
        MISTRAL,
        ("<s>", "</s>", "[INST]", "[/INST]"),
        "</s>",
        ("<s>[INST]What is two plus two?[/INST]«It is four.</s>»[INST]And three?[/INST]«Six</s>»",),
    ),
    "gemma": (
        GEMMA,
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        (
            (
                "<bos><start_of_turn>user\nWhat is two plus two?<end_of_turn>\n<start_of_turn>model\n"
                "«It is four.<end_of_turn>»\n<start_of_turn>user\nAnd three?<end_of_turn>\n<start_of_turn>model\n"
                "«Six<end_of_turn>»\n"
            ),
        ),
    ),
    # It writes <|endoftext|> after each last turn: a dialogue is no prefix of its continuation.
    "phi3": (
        PHI3,
        ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "<|end|>",
        (
            "<|user|>\nWhat is two plus two?<|end|>\n<|assistant|>\n«It is four.<|end|>»\n<|endoftext|>",
            (
                "<|user|>\nWhat is two plus two?<|end|>\n<|assistant|>\nIt is four.<|end|>\n"
                "<|user|>\nAnd three?<|end|>\n<|assistant|>\n«Six<|end|>»\n<|endoftext|>"
            ),
        ),
    ),
    # It thinks in the last turn only, and takes that back later.
    "qwen3": (
        QWEN3,
        ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
        "<|im_end|>",
        (
            (
                "<|im_start|>user\nWhat is two plus two?<|im_end|>\n<|im_start|>assistant\n"
                "«<think>\n\n</think>\n\nIt is four.<|im_end|>»\n"
            ),
            (
                "<|im_start|>user\nWhat is two plus two?<|im_end|>\n<|im_start|>assistant\nIt is four.<|im_end|>\n"
                "<|im_start|>user\nAnd three?<|im_end|>\n<|im_start|>assistant\n"
                "«<think>\n\n</think>\n\nSix<|im_end|>»\n"
            ),
        ),
    ),
    "marked": (
        MARKED,
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        (
            (
                "<|im_start|>user\nWhat is two plus two?<|im_end|>\n<|im_start|>assistant\n«It is four.<|im_end|>»\n"
                "<|im_start|>user\nAnd three?<|im_end|>\n<|im_start|>assistant\n«Six<|im_end|>»\n"
            ),
        ),
    ),
}
