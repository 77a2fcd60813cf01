"""What a chat template makes of a conversation: where its answers stand, what ends them, which tokens are controls.

Templates differ in more than their marks. Some strip `<think>` blocks, or spaces, from earlier answers; some put an
empty block before the last one, or the date into the system turn. So an answer is never looked for by its text: the
template renders a mark in its place, and before the last answer stands what a question for it would read.
"""

from functools import lru_cache
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

END_MARK = "###"  # of an answer in the published layout

# For language models without a chat template: the layout with which the published weights were trained. Every question
# follows BOS in [INST] brackets, its answer follows without a space and ends in ###. The first of the two spaces ends
# the question, the second belongs to the bracket.
# Source: the released code of MiniGPT-3D and PointAlign. All stages set `chat_template: True`, which brackets the
# question of single-turn samples too. MiniGPT-3D's evaluation uses another layout than its training (`<s>` as text in
# place of BOS, and a second [INST] after the cloud); here a model is asked in the layout of its training.
PLAIN_CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ m['content'] }}"
    f"{END_MARK}"
    "{% else %}{{ bos_token or '' }}[INST] {{ m['content'] }}  [/INST]{% endif %}{% endfor %}"
)

ANSWER = "\ue001"  # of the private use area: in the place of an answer while a template is rendered
# For templates that write today's date: a run that is resumed tomorrow reads the same tokens.
FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"

Messages = list[dict[str, str]]  # with text alone


def render(tokenizer: PreTrainedTokenizerBase, template: str, messages: Messages, prompt: bool, **values: Any) -> str:
    """The text that a template makes of messages; models that can think answer without.

    Args:
        prompt: end with the opening of an answer.
        values: for the template, beside the messages.

    Raises: ValueError: the template refuses the messages, as some refuse a system turn or two questions in a row.
    """
    values = {"enable_thinking": False} | values
    template = (FIXED_DATE if "strftime_now" in template else "") + template
    try:
        return tokenizer.apply_chat_template(  # type: ignore[return-value]
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt, **values
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the chat template refuses turns of {roles}: {error}") from error


def without_system_text(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's chat template, with an empty system turn in place of a text that it writes by itself.

    Returns: The template as it is where it writes no such text, or refuses a system turn; None without a template.
    """
    if not tokenizer.chat_template:
        return None
    template = tokenizer.get_chat_template()
    empty = "{% set messages = [{'role': 'system', 'content': ''}] + messages %}"
    emptied = f"{{% if messages[0]['role'] != 'system' %}}{empty}{{% endif %}}{template}"
    written = render(tokenizer, template, _turns("u"), True)
    try:
        return emptied if len(render(tokenizer, emptied, _turns("u"), True)) < len(written) else template
    except ValueError:  # it refuses a system turn
        return template


def control_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> list[str]:
    """Tokens that are plain text where a user types them: special tokens, and added ones that the template writes.

    `all_special_tokens` lacks some: Llama 3's `<|start_header_id|>` is in the list of added tokens only.
    """
    return _control_tokens(tokenizer, template, len(tokenizer))


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: PreTrainedTokenizerBase, template: str, _size: int) -> list[str]:
    written = template + render(tokenizer, template, _turns("u", "a"), True)  # and what it puts together from pieces
    added = tokenizer.added_tokens_decoder.values()
    tokens = {token.content for token in added if token.special or token.content in written}
    tokens |= set(tokenizer.all_special_tokens)
    return [token for token in tokens if len(token.strip()) > 1]  # added tokens of spaces are ordinary text


@lru_cache(maxsize=8)
def answer_end(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """The mark that ends every answer, as `<|im_end|>`, and nothing of what only ends the conversation; "" for none."""
    last = render(tokenizer, template, _turns("u", ANSWER), False).rpartition(ANSWER)[2]
    earlier = render(tokenizer, template, _turns("u", ANSWER, "u"), False).rpartition(ANSWER)[2]
    shared = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(last, earlier, strict=False)))
    # two control tokens may begin alike: an end within a token is no end
    ends = [shared.rfind(token) + len(token) for token in control_tokens(tokenizer, template) if token in shared]
    return shared[: max(ends)] if ends else shared.rstrip()


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    """The id of a token of the vocabulary; None where there is none. A copy of the vocabulary takes much longer."""
    number = tokenizer.convert_tokens_to_ids(token)
    return number if number is not None and tokenizer.convert_ids_to_tokens(number) == token else None


@lru_cache(maxsize=8)
def trims_answers(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether the template removes spaces around an answer."""
    return f" {ANSWER} " not in render(tokenizer, template, _turns("u", f" {ANSWER} "), False)


def find_answers(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Messages, prompt: bool, values: dict[str, Any]
) -> list[tuple[str, bool]]:
    """The rendered text in parts `(text, is_answer)`; an answer is the text of an assistant's turn and its end mark.

    What is before the last answer reads as it does when the model is asked, to the letter.

    Raises: ValueError: the template refuses the turns, or leaves one out.
    """
    mark = unused(ANSWER, "".join(message["content"] for message in messages))
    end, trims = answer_end(tokenizer, template), trims_answers(tokenizer, template)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    hidden = [message | {"content": mark} if message["role"] == "assistant" else message for message in messages]
    if len(hidden) > 1 and hidden[-1]["role"] == "assistant" and not prompt:
        closing = render(tokenizer, template, hidden, False, **values).rpartition(mark)[2]
        text = render(tokenizer, template, hidden[:-1], True, **values) + mark + closing
    else:
        text = render(tokenizer, template, hidden, prompt, **values)
    before, *rest = text.split(mark)
    if len(rest) != len(answers):
        raise ValueError(
            f"the chat template leaves out or repeats turns: it wrote {len(rest)} of {len(answers)} answers"
        )
    parts = [(before, False)]
    for answer, after in zip(answers, rest, strict=True):
        mark_of_end = end if after.startswith(end) else ""
        parts += [((answer.strip() if trims else answer) + mark_of_end, True), (after[len(mark_of_end) :], False)]
    return parts


def unused(marker: str, text: str) -> str:
    """`marker`, bracketed until it does not occur in `text`."""
    while marker in text:
        marker = f"<{marker}>"
    return marker


def _turns(*contents: str) -> Messages:
    return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(contents)]
