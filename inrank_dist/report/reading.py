"""What can and cannot be concluded from a run, as sentences generated from its records."""

from __future__ import annotations

from typing import Any

from ..runtime.words import plural
from ..train.monitors.ranks import mean
from ..train.monitors.text import amount, fixed, number
from .history import History
from .run import ON_FACTORS, value_of


def reading(history: History, settings: dict[str, Any], control: str = "") -> list[str]:
    """Plain sentences, the most important first. ``settings`` is the resolved config, or {}; ``control`` is what
    is known of a control of the run."""
    sentences = [_end(history), _loss(history), _generalisation(history), _ranks(history, settings)]
    sentences += _not_found(history)
    sentences += [
        _parameters(history),
        _passes(history),
        _broken(history),
        _resumes(history),
        _seeds(history),
        control,
    ]
    return [sentence for sentence in sentences if sentence]


def mode_of(history: History, settings: dict[str, Any]) -> str:
    """``lowrank.mode`` of the run; ``-`` if neither its records nor its config contain it."""
    return str(history.start.get("mode") or value_of(settings, "lowrank", "mode") or "-")


def _end(history: History) -> str:
    if history.ended:
        return ""
    return f"The run has not finished: the records end at step {history.last_step:,}{history.goal}, without a summary."


def _loss(history: History) -> str:
    loss, entropy = history.validation_loss, history.unigram_entropy
    if loss is None:
        return "There is no validation in these records: the training loss alone says nothing about unseen text."
    if entropy is None:
        return f"The validation loss is {loss:.3f} nats per token; no unigram entropy was recorded beside it."
    if _no_better_than_frequencies(history):
        return (
            f"The validation loss, {loss:.3f} nats per token, is not below the unigram entropy, {entropy:.3f}"
            ": the model predicts no better than the token frequencies do."
        )
    return (
        f"The validation loss is {loss:.3f} nats per token, {entropy - loss:.3f} below the unigram entropy, "
        f"{entropy:.3f}: that much comes from context."
    )


def _no_better_than_frequencies(history: History) -> bool:
    loss, entropy = history.validation_loss, history.unigram_entropy
    return loss is not None and entropy is not None and loss >= entropy


def _generalisation(history: History) -> str:
    losses = [(value, step) for step, value in history.eval_curve("loss") if value is not None]
    if not losses:
        return ""
    best, at = min(losses)
    now = losses[-1][0]
    if now > best + 0.01:
        return (
            f"The best validation loss was {best:.3f} at step {at:,.0f}; the last is {now - best:.3f} above "
            "it (over-fitting, or a run that became unstable)."
        )
    train = history.train_loss
    if train is not None:
        return f"The training loss at the end, {train:.3f}, is {_signed(now - train)} the validation loss."
    return ""


def _signed(gap: float) -> str:
    return f"{abs(gap):.3f} {'below' if gap >= 0 else 'above'}"


def _ranks(history: History, settings: dict[str, Any]) -> str:
    if not history.table.ranks:
        mode = mode_of(history, settings)
        return "Full rank: no layer is factored; such a run can serve as a control." if mode == "full" else ""
    ranks, nulls = history.table.ranks, history.table.null_ranks
    if not nulls:
        fixed_rank = mode_of(history, settings) == "fixed"
        why = "the rank was set, not found" if fixed_rank else "no rule has been applied yet"
        return f"No null rank was recorded ({why}): these ranks say nothing about what was learned."
    judged, found = [name for name in ranks if name in nulls], history.table.found
    same = {*history.table.null_layers}
    below = sum(name not in same and found[name] < nulls[name] for name in judged)
    above = len(judged) - len(same) - below
    counts = [f"In {len(same):,} of {plural(len(judged), 'layer')} the rank found is the null rank within 2%"]
    counts += [f"in {below:,} it is below"] if below else []
    counts += [f"in {above:,} it is above"] if above else []
    means = [fixed(mean(values[name] for name in judged), 1) for values in (found, nulls)]
    sentences = [f"{', '.join(counts)} (mean rank found {means[0]}, mean null rank {means[1]})."]
    optimizer = value_of(settings, "optimizer", "name")
    if _no_better_than_frequencies(history):
        sentences.append("The model predicts no better than the token frequencies, so its ranks show no learning.")
    elif optimizer in ON_FACTORS:
        sentences.append(
            f"With optimizer.name {optimizer} all modes move at one pace, so the explained ratio measures the "
            "optimizer and not the data: the ranks found do not show that a rank was learned."
        )
    else:
        sentences += ["Where they are equal, the rule has not seen learning."] if same else []
        if below:
            sentences.append(
                "Below the null rank, the spectrum is steeper than that of untrained factors. That also happens where "
                "there is nothing to learn, so it does not show that the rank was learned."
            )
        if above:
            sentences.append(
                "Above the null rank, the rule found more modes than in untrained factors, which does not show that "
                "all of them were learned."
            )
    if without := len(ranks) - len(judged):
        sentences.append(f"{plural(without, 'layer')} without a null rank: those ranks have no meaning.")
    return " ".join(sentences)


def _not_found(history: History) -> list[str]:
    """Sentences on ranks that are not findings, for reasons other than the null rank."""
    table, sentences = history.table, []
    layers = plural(len(table.ranks), "layer")
    if pinned := len(table.pinned_layers):
        sentences.append(
            f"In {pinned:,} of {layers} the rank never left lowrank.initial_rank, {table.initial_rank:g}: it is pinned "
            "by its start, and the rule, which only raises ranks, says nothing about how small it could have been."
        )
    if cut := len(table.cut_layers):
        sentences.append(
            f"In {cut:,} of {layers} the freeze kept less than the rule had found, and that explains less than the "
            f"threshold, {table.threshold:g}."
        )
    return sentences


def _parameters(history: History) -> str:
    now, dense = history.parameters, number(history.summary.get("parameters_dense"))
    if now is None or dense is None or not history.table.ranks:
        return ""
    if now >= dense:
        return f"The trained model had {amount(now)} parameters and the dense one {amount(dense)}: nothing was saved."
    saved = 100 * (1 - now / dense)
    return f"The trained model had {amount(now)} parameters, {saved:.0f}% fewer than the dense one ({amount(dense)})."


def _passes(history: History) -> str:
    tokens, corpus = history.tokens, number(history.first("train_tokens"))
    if not tokens or not corpus:
        return ""
    text = f"It was trained on {amount(tokens)} tokens, {tokens / corpus:.2f} times the training set"
    if history.parameters:
        each = tokens / history.parameters
        text += f", {each:,.0f} tokens per parameter" if each >= 10 else f", {each:.2g} tokens per parameter"
    return text + "."


def _broken(history: History) -> str:
    losses = history.curve("loss")
    bad = sum(value is None for _, value in losses)
    return f"In {bad:,} of {plural(len(losses), 'logged step')} the loss is not a finite number." if bad else ""


def _resumes(history: History) -> str:
    if not history.resumes:
        return ""
    sizes = {record.get("world_size") for record in history.resumes} | {history.start.get("world_size")}
    where = ", ".join(f"{record['step']:,}" for record in history.resumes)
    times = len(history.resumes)
    text = f"The run was resumed {'once' if times == 1 else f'{times} times'} (at step {where})"
    return text + (", and the number of processes changed." if len(sizes) > 1 else ".")


def _seeds(history: History) -> str:
    seed = history.first("seed")
    named = f" ({seed})" if seed is not None else ""
    return f"One seed{named}: a difference from another run may be chance, or one in learning rate or initial scale."
