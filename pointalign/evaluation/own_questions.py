"""The task `answers`: the questions of a user's annotation file, scored against its answers."""

from pathlib import Path

from pointalign.data.conversations import POINT_MARKER, load_conversations
from pointalign.evaluation.tasks import Question, Task, evenly

TASK = "answers"


def question_task(annotations: Path, limit: int | None = None) -> Task:
    """The first question of every conversation that opens with clouds; the first answer is the truth.

    The clouds stand before the text; a marker inside the text becomes "object 1", "object 2" and so on. Scored as
    captions are, and judged by how much of the reference an answer states.

    Args:
        limit: at most this many questions, evenly spaced.

    Raises: ValueError: no conversation opens with a cloud.
    """
    questions = []
    for number, conversation in enumerate(load_conversations(annotations)):
        (_, text), (_, answer) = conversation.turns[:2]
        marked = text.count(POINT_MARKER)
        if not marked:
            continue
        asked = text.strip()
        while asked.startswith(POINT_MARKER):
            asked = asked.removeprefix(POINT_MARKER).strip()
        first = marked - asked.count(POINT_MARKER)
        for place in range(first + 1, marked + 1):
            asked = asked.replace(POINT_MARKER, f"object {place}", 1)
        ids = conversation.object_ids[:marked]
        questions.append(
            Question(
                f"{number}/{'+'.join(ids)}", ids, asked, answer, family=ids[0], kind=conversation.conversation_type
            )
        )
    if not questions:
        raise ValueError(f"{annotations}: no conversation opens with a question about a cloud")
    return Task(TASK, "captioning", "", [questions[i] for i in evenly(len(questions), limit)])
