"""What the gated policy stands beside: policies of one evaluation, as data.

``recipes/evaluate_gated.py --baselines`` runs them, a table of docs/generator.md has a row for
each, measured or not.
"""

from typing import NamedTuple


class Baseline(NamedTuple):
    """A policy.

    Attributes:
        label: its name in tables and results.
        spec: in the words of ``dynmask evaluate --policy``; ``{gated}`` and ``{retained}`` stand
            for the cards beside the model.
    """

    label: str
    spec: str

    @property
    def kind(self) -> str:
        """The policy's own name."""
        return self.spec.partition(":")[0]


BASELINES = (
    Baseline("full", "full"),
    Baseline("gated (zero-shot)", "gated"),
    Baseline("gated (card)", "gated:{gated}"),
    Baseline("gated (card, decode=keep)", "gated:{gated},decode=keep"),
    Baseline("streaming", "streaming"),
    Baseline("elastic", "elastic"),
    # as released, and with about the budget of the others
    Baseline("vertical_slash", "vertical_slash"),
    Baseline("vertical_slash 200+1000", "vertical_slash:verticals=200,slashes=1000"),
    Baseline("flexprefill", "flexprefill"),
    Baseline("xattention", "xattention"),
    Baseline("quest", "quest"),
    Baseline("h2o", "h2o"),
    Baseline("snapkv", "snapkv"),
    Baseline("retained w=512", "retained:{retained},width=512"),
    Baseline("oracle_blocks", "oracle_blocks"),
    Baseline("oracle_tokens", "oracle_tokens"),
)
"""Full attention is what the others are compared with; the last two are bounds."""
