"""Questions with reasoning and answers, as a chat whose assistant thinks, or as plain text."""

from glm.recipe.midtrain import ReasoningCorpus
from glm.tokenizer.chat_template import Segment, render
from midtrain.messages import Unusable, read_messages


def segments_of(record: dict, corpus: ReasoningCorpus) -> tuple[list[Segment], str]:
    """(what is tokenized, the question it is about). Raises Unusable."""
    if "messages" in record and not corpus.fields:
        messages = read_messages(record["messages"])
        question = next((message["content"] for message in messages if message["role"] == "user"), "")
        if corpus.form == "text":
            raise Unusable("messages, which the form text does not take")
        return render(messages, close=True), str(question)
    question, reasoning, answer = (_field(record, corpus, name) for name in ("question", "reasoning", "answer"))
    if not question or not answer:
        raise Unusable("no question or no answer")
    if corpus.form == "text":
        told = f"\nReasoning: {reasoning}" if reasoning else ""
        return [Segment(f"Question: {question}{told}\nAnswer: {answer}")], question
    reply = {"role": "assistant", "reasoning_content": reasoning, "content": answer}
    return render([{"role": "user", "content": question}, reply], close=True), question


def _field(record: dict, corpus: ReasoningCorpus, name: str) -> str:
    key = corpus.fields.get(name, name)
    value = record.get(key)
    if value is None and key not in record and name != "reasoning":
        raise Unusable(f"no key {key!r}")
    if not isinstance(value, str | None):
        raise Unusable(f"{key!r} is not text")
    return (value or "").strip()
