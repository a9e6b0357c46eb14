"""The data sets of the QLoRA paper, by name. Knows nothing of how they are loaded.

Where the figures come from: rows, columns and licences are those on each set's page on the Hugging Face Hub (for FLAN v2 that of the
sample named here, for Chip2 that of the collection it is part of); which sets there are is `qlora.py` of the authors' repository
(artidoro/qlora); uses and findings are those of the paper, arXiv 2305.14314. An empty field is one that no page states.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PaperSet:
    """A data set that the paper trained on. `reference` is empty for one that was never released; `format` is the kind of its rows.

    `held_out_split` is the split of its own that the paper's authors measure on.
    """

    name: str
    title: str
    reference: str
    rows: str
    licence: str
    format: str
    used_for: str
    note: str = ""
    held_out_split: str = ""


_SETS = (
    PaperSet(
        name="oasst1",
        title="OASST1 (Guanaco)",
        reference="timdettmers/openassistant-guanaco",
        rows="9,846",
        licence="Apache-2.0",
        format="guanaco",
        used_for="The Guanaco chat models: the paper's best on the Vicuna benchmark, although this is its smallest set.",
        note="The best-rated path of each OpenAssistant conversation, in many languages; the paper trains on both sides of it.",
        held_out_split="test",
    ),
    PaperSet(
        name="alpaca",
        title="Alpaca",
        reference="tatsu-lab/alpaca",
        rows="52,002",
        licence="CC-BY-NC-4.0",
        format="alpaca",
        used_for="Showing that 4-bit NF4 training keeps up with 16-bit on MMLU, and that LoRA must be on all linear layers to do so.",
        note="Answers by text-davinci-003; its last column repeats the row as one text and is not used here.",
    ),
    PaperSet(
        name="alpaca-cleaned",
        title="Alpaca, cleaned",
        reference="yahma/alpaca-cleaned",
        rows="51,760",
        licence="CC-BY-4.0",
        format="alpaca",
        used_for="An alternative to Alpaca in the authors' code; the paper reports no figures for it.",
        note="Alpaca with wrong, empty and merged answers corrected by its users.",
    ),
    PaperSet(
        name="self-instruct",
        title="Self-Instruct",
        reference="yizhongw/self_instruct:self_instruct@refs/convert/parquet",
        rows="82,612",
        licence="Apache-2.0",
        format="prompt-completion",
        used_for="One of the instruction sets compared on MMLU, where it does worse than the more carefully made ones.",
        note="Its page holds a program, which is never run: the rows come from the Hub's own Parquet copy.",
    ),
    PaperSet(
        name="unnatural-instructions",
        title="Unnatural Instructions",
        reference="mrm8488/unnatural-instructions-core",
        rows="66,010",
        licence="",
        format="instances",
        used_for="One of the instruction sets compared on MMLU, among the better ones for the smaller models.",
        note="The core set of 68,478 examples; the paper uses 240,670, with paraphrases that mrm8488/unnatural-instructions-full adds.",
    ),
    PaperSet(
        name="chip2",
        title="Chip2 (OIG)",
        reference="laion/OIG:unified_chip2.jsonl",
        rows="about 210,000",
        licence="Apache-2.0",
        format="chip2",
        used_for="One of the instruction sets compared on MMLU and as a chatbot.",
        note="One file of the Open Instruction Generalist collection.",
    ),
    PaperSet(
        name="longform",
        title="LongForm",
        reference="akoksal/LongForm",
        rows="23,652",
        licence="MIT",
        format="prompt-completion",
        used_for="One of the instruction sets compared on MMLU and as a chatbot.",
        note="Long texts by people, with instructions that a model wrote for them: expect rows beyond max_seq_len.",
    ),
    PaperSet(
        name="hh-rlhf",
        title="HH-RLHF",
        reference="Anthropic/hh-rlhf",
        rows="160,800",
        licence="MIT",
        format="hh-rlhf",
        used_for="One of the sets compared on MMLU and as a chatbot, trained on the preferred answers without reinforcement learning.",
        note="Made for preference models: the rejected answers are not used here, and some preferred ones are only the lesser evil.",
    ),
    PaperSet(
        name="flan-v2",
        title="FLAN v2 (sample)",
        reference="itay1itzhak/flan_2022_350k",
        rows="350,023",
        licence="Apache-2.0",
        format="prompt-completion",
        used_for="The best of the sets on MMLU and a poor chatbot: the paper's case that a benchmark is not a measure of chat.",
        note="A balanced sample by others: the paper's own sample was not published, and the whole is at SirNeural/flan_v2.",
    ),
    PaperSet(
        name="vicuna",
        title="Vicuna (ShareGPT)",
        reference="",
        rows="",
        licence="",
        format="sharegpt",
        used_for="Vicuna itself, which the paper's chatbots are measured against.",
        note="Never released by its authors: to train on such conversations, bring your own as ShareGPT rows.",
    ),
)

CATALOG: dict[str, PaperSet] = {paper_set.name: paper_set for paper_set in _SETS}
