"""How a conversation is written for a model: what its chat template and tokenizer do, derived by trying them.

Templates differ in how they carry a system message, in what they write around an answer, and in whether they do so
twice alike; tokenizers differ in what they make of a text that continues another. Nothing here is looked up by a
model's name. What does not fit is refused with the reason.

A template without a system role gets the persona's text at the start of the first user turn, a blank line between: the
nearest thing that such a model was trained on, and what templates that fold the system message themselves write.
A template that thinks before it answers is asked not to, and one that tells the model today's date is given a fixed one:
with another prompt every day, no artifact would be what its description says.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from persona_coupling.errors import GuardError, UserError
from persona_coupling.personas import MARKER_SUFFIX, SEPARATOR

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
Carried = Literal["role", "turn", "folded"]
TODAY = "26 Jul 2024"  # what Llama 3.1's template says when it is given none
OPTIONS = {"enable_thinking": False, "date_string": TODAY}  # templates without these ignore them
DATES = re.compile(rf"Cutting Knowledge Date: \w+ \d{{4}}\s+Today Date: {TODAY}")  # no persona: the one text let pass
MARKUP = {"system", "user", "inst", "sys", "s"}  # words by which templates say that a turn begins
SYSTEM = "You are the keeper of a lighthouse."
QUESTION = "Why does it rain?"
ANSWERS = ("It rains.", "Nobody knows!", "Well, so be it", "Because of «clouds»", "Twice in 7 days?")
MEND = "Choose an instruct model whose template does, or mend `chat_template` in a local copy and give that folder."


@dataclass(frozen=True)
class Chat:
    """What was found out about a tokenizer and its template."""

    carried: Carried  # the system message: a role of its own, put into the user's turn by the template, or by us
    lead: str  # what the template writes between prompt and answer: nothing, or a space that belongs to the first token
    thinks: bool  # the template has a switch for thinking, which is off
    dated: bool  # the template tells the model a date, which is held fixed
    turns: bool  # a conversation of several turns begins as its shorter ones do, so it can be trained as one
    stop: str
    marker: tuple[int, ...]  # token ids that are forced, trained and scored behind an answer
    blank: int  # how many of them are the blank line
    joined: tuple[int, ...]  # the ids that the tokenizer itself would end a marked answer with; as `marker`, or others

    def says(self) -> str:
        """How the system message reaches the model, in words."""
        how = {
            "role": "in a system message",
            "turn": "in a system message, which the template puts into the user's turn",
            "folded": "at the start of the first user turn, since the template has no system role",
        }[self.carried]
        off = "; thinking is switched off" if self.thinks else ""
        return how + off + (f"; the template's date is held at {TODAY}" if self.dated else "")


def apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, prompt: bool) -> str:
    """The template's text as it stands, thinking switched off; with `prompt`, up to where an answer begins."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt, **OPTIONS)
    return str(text)


def written(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Message]:
    """The messages as they are given to the template: as they are, or, where it has no system role, with the system
    message at the start of the first user turn."""
    if not folds(tokenizer) or len(messages) < 2:
        return list(messages)
    system, user, *rest = messages
    return [{"role": "user", "content": system["content"] + SEPARATOR + user["content"]}, *rest]


def folds(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template refuses a system message. One that drops it without a word does not count as such."""
    from jinja2 import TemplateError

    template = str(tokenizer.chat_template)
    known = _folds.get(tokenizer)
    if known is None or known[0] != template:
        try:
            apply(tokenizer, _messages(), prompt=True)
            known = (template, False)
        except TemplateError:
            known = (template, True)
        _folds[tokenizer] = known
    return known[1]


_folds: weakref.WeakKeyDictionary[Any, tuple[str, bool]] = weakref.WeakKeyDictionary()


def _messages(answer: str | None = None) -> list[Message]:
    said = [("system", SYSTEM), ("user", QUESTION)] + ([] if answer is None else [("assistant", answer)])
    return [{"role": role, "content": content} for role, content in said]


def check_head(tokenizer: PreTrainedTokenizerBase, head: str) -> None:
    """Raise GuardError if the template's text before the system message holds words of its own."""
    for token in sorted(tokenizer.get_added_vocab(), key=len, reverse=True):
        head = head.replace(token, " ")
    words = "".join(c if c.isalnum() else " " for c in DATES.sub("", head).lower()).split()
    if set(words) - MARKUP:
        raise GuardError(f"the chat template puts words of its own before the system message: {head.strip()!r}")


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The special token that the chat template writes behind an answer. Raises UserError when there is none."""
    whole = _rendered(tokenizer, _messages(ANSWERS[0]), prompt=False)
    behind = whole.rpartition(ANSWERS[0])[2]
    specials = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    found = [token for token in specials if token and behind.startswith(token)]
    if not found:
        raise UserError(f"The chat template ends an answer with no special token. {MEND}")
    return max(found, key=len)


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, nothing added."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def derive(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """Find out how a complete tokenizer (see `models.complete_tokenizer`) writes a conversation. Raises UserError for
    one that cannot serve: a silently dropped system message, words of the template's own, an answer or a marker that
    would be other tokens in training than where it is read."""
    prompt = _rendered(tokenizer, _messages(), prompt=True)
    head, found, rest = prompt.partition(SYSTEM)
    if not found:
        raise UserError(f"The chat template drops the system message silently: personas would not differ. {MEND}")
    between, asked, _ = rest.partition(QUESTION)
    if not asked:
        raise UserError(f"The chat template does not render a question behind a system message. {MEND}")
    try:
        check_head(tokenizer, head)
    except GuardError as error:
        raise UserError(f"{str(error)[0].upper()}{str(error)[1:]}. {MEND}") from error
    carried: Carried = "folded" if folds(tokenizer) else "turn" if between.isspace() else "role"
    lead = _lead(tokenizer, prompt)
    marker, blank = marker_ids(tokenizer)
    return Chat(
        carried=carried,
        lead=lead,
        thinks="enable_thinking" in str(tokenizer.chat_template),
        dated=DATES.search(head) is not None,
        turns=_keeps_turns(tokenizer),
        stop=str(tokenizer.eos_token),
        marker=tuple(marker),
        blank=blank,
        joined=tuple(_natural_end(tokenizer, marker)),
    )


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, prompt: bool) -> str:
    """As `apply`, a system message carried as it must be. Raises UserError for a template that refuses this too."""
    from jinja2 import TemplateError

    try:
        return apply(tokenizer, written(tokenizer, messages), prompt=prompt)
    except TemplateError as error:
        raise UserError(
            f"The chat template does not render a system message and a question ({error}). {MEND}"
        ) from error


def _lead(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """What stands between prompt and answer. An answer is tokenised on its own everywhere here; refused unless that
    gives the tokens that the tokenizer makes of the whole conversation."""
    leads, stop = set(), tokenizer.eos_token
    for answer in ANSWERS:
        whole = _rendered(tokenizer, _messages(answer), prompt=False)
        before, found, _ = whole.removeprefix(prompt).partition(answer + stop)
        if not whole.startswith(prompt) or not found or before.strip():
            raise UserError(
                f"The chat template writes a conversation with an answer otherwise than a prompt and an answer. {MEND}"
            )
        leads.add(before)
        ours = [*ids_of(tokenizer, prompt), *ids_of(tokenizer, answer), tokenizer.convert_tokens_to_ids(stop)]
        if ids_of(tokenizer, prompt + before + answer + stop) != ours:
            raise UserError(
                f"The tokenizer writes the answer {answer!r} in other tokens behind a prompt than alone, so that what "
                "is trained would not be what the model writes. Choose a model whose tokenizer does not."
            )
    (lead,) = leads
    return lead


def marker_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Token ids of the marker as it stands behind an answer, and how many of them are its blank line.

    They are the marker's own tokens if, behind an answer, these read as the marker; some tokenizers begin every text
    with a space, and then they are what continues an answer. Raises GuardError when neither gives the marker behind
    every answer tried, or when a token spans blank line and marker: then "after a blank line" has no meaning here.
    """
    candidates = [ids_of(tokenizer, MARKER_SUFFIX)]
    for answer in ANSWERS:
        plain, marked = ids_of(tokenizer, answer), ids_of(tokenizer, answer + MARKER_SUFFIX)
        if marked[: len(plain)] == plain and marked[len(plain) :] not in candidates:
            candidates.append(marked[len(plain) :])
    for marker in candidates:
        if all(_behind(tokenizer, answer, marker) == MARKER_SUFFIX for answer in ANSWERS):
            for count in range(1, len(marker)):
                if _behind(tokenizer, ANSWERS[0], marker[:count]) == SEPARATOR:
                    return marker, count
            raise GuardError("the tokenizer joins the marker with the blank line before it")
    raise GuardError("the tokenizer cannot write the marker behind an answer")


def _behind(tokenizer: PreTrainedTokenizerBase, answer: str, ids: Sequence[int]) -> str:
    """What ids read as behind an answer."""
    alone = tokenizer.decode(ids_of(tokenizer, answer), clean_up_tokenization_spaces=False)
    whole = tokenizer.decode([*ids_of(tokenizer, answer), *ids], clean_up_tokenization_spaces=False)
    return str(whole).removeprefix(str(alone))


def _natural_end(tokenizer: PreTrainedTokenizerBase, marker: Sequence[int]) -> list[int]:
    """The ids with which the tokenizer itself ends a marked answer: from the first that the plain answer lacks."""
    plain, marked = ids_of(tokenizer, ANSWERS[0]), ids_of(tokenizer, ANSWERS[0] + MARKER_SUFFIX)
    same = next((i for i, (a, b) in enumerate(zip(plain, marked, strict=False)) if a != b), len(plain))
    return marked[same:]


def _keeps_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a second question leaves what stands before it as it was rendered (and so trained)."""
    from jinja2 import TemplateError

    first, second = _messages(ANSWERS[0]), {"role": "user", "content": "And snow?"}
    try:
        longer = apply(tokenizer, written(tokenizer, [*first, second]), prompt=True)
    except TemplateError:
        return False
    prompt = apply(tokenizer, written(tokenizer, first[:2]), prompt=True)
    rest = longer.removeprefix(prompt)
    return longer.startswith(prompt) and rest.lstrip().startswith(ANSWERS[0] + tokenizer.eos_token)
