import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from hfquant import methods
from hfquant.measure import card
from hfquant.measure.markdown import code, fence

OURS = {"<details>", "<summary>1 compressed layers</summary>", "</details>"}
HOSTILE = [
    "x`<script>alert(1)</script>`",
    "``` \n<img src=x onerror=alert(1)>\n```\n# owned",
    "a|b\n|c|d|",
    "---\nlicense: mit\n---\n",
    "[click](https://evil.example) ![x](https://evil.example/x.png) <https://evil.example>",
    "</details><h1>owned</h1>",
    "{{ 7 * 7 }}{% raw %}",
    "\u202egnp.exe\x00\x1b[31m\u2028# owned",
    "` `` ``` ````",
    "~~~\n# owned\n~~~",
    "- tags:\n  - owned",
    "\\`<b>owned</b>\\",
]


def full(**changes: Any) -> dict[str, Any]:
    report: dict[str, Any] = {
        "schema": 1,
        "hfquant": "0.1.0",
        "source": {
            "id": "org/model-1B",
            "revision": "abc123",
            "bytes": 2_000_000_000,
            "license": "apache-2.0",
        },
        "recipe": {
            "name": "gptq-w4g64",
            "steps": [{"method": "gptq"}],
            "grid": {"bits": 4, "group_size": 64},
        },
        "calibration": {"source": "default", "samples": 64, "seq_len": 512, "seed": 0, "sha256": "0" * 64},
        "wire": {"format": "compressed_tensors"},
        "layers": [
            {
                "name": "model.layers.0.mlp.up_proj",
                "kind": "linear",
                "shape": [64, 32],
                "grid": {"bits": 4, "group_size": 64, "symmetric": True},
                "method": "gptq",
                "error": 0.0123456,
                "bytes_before": 4096,
                "bytes_after": 1152,
                "notes": ["no Hessian: rounded"],
            }
        ],
        "compression": {"seconds": 61.7, "peak_memory_bytes": 650_000_000},
        "output": {
            "bytes": 700_000_000,
            "files": [],
            "architecture": "LlamaForCausalLM",
            "model_type": "llama",
            "encoder_decoder": False,
        },
        "evaluation": {
            "perplexity": 11.0,
            "reference_perplexity": 10.0,
            "growth_error": 0.004,
            "kl": 0.0512,
            "top1_agreement": 0.875,
            "tokens": 32704,
            "windows": 64,
            "window": 512,
            "tokens_per_second": 40.25,
            "reference_tokens_per_second": None,
            "settings": {
                "text": "hfquant evaluation",
                "sha256": "d0" * 32,
                "selection": "the first windows of the text",
                "dtype": "bfloat16",
                "threads": 2,
                "feed": "causal",
            },
            "hardware": {"processor": "A Processor"},
        },
        "sample": {"prompt": "Dorothy lived", "original": "in Kansas.", "compressed": "in Texas."},
        "gate": {"passed": True, "limits": {"max_ppl_ratio": 3.0, "max_kl": None}, "broken": []},
    }
    return report | changes


def metadata(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def outline(text: str) -> tuple[list[str], set[str], list[str], int]:
    """Headings, lines of HTML, link and image targets, number of tables, as a Markdown reader sees them."""
    reader = MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = reader.parse(text.split("---\n", 2)[2])
    headings = [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open"]
    every = [*tokens, *(child for t in tokens for child in t.children or [])]
    html = {part for t in every if t.type.startswith("html") for part in t.content.split("\n")}
    linked = [t.attrs for t in every if t.type in ("link_open", "image")]
    targets = [str(attrs.get("href") or attrs.get("src")) for attrs in linked]
    return headings, html - {""}, targets, sum(t.type == "table_open" for t in tokens)


def test_metadata_for_the_hub() -> None:
    text = card.render(full())
    assert metadata(text) == {
        "base_model": "org/model-1B",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["hfquant", "compressed-tensors", "gptq-w4g64", "gptq"],
        "model-index": [
            {
                "name": "org/model-1B",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "hfquant evaluation", "type": "text"},
                        "metrics": [
                            {"type": "perplexity", "value": 11.0, "name": "Perplexity"},
                            {
                                "type": "kl",
                                "value": 0.0512,
                                "name": "KL divergence from the original, nats per token",
                            },
                            {
                                "type": "top1_agreement",
                                "value": 0.875,
                                "name": "Same most likely token as the original",
                            },
                        ],
                    }
                ],
            }
        ],
    }
    assert ModelCard(text).data.base_model == "org/model-1B"


def test_the_numbers_are_in_the_table() -> None:
    text = card.render(full())
    assert "| weights on disk | 2 GB | 700 MB |" in text
    assert "| perplexity | 10 | 11 |" in text
    assert (
        "| perplexity by the original's (± standard error of its mean over such text) | 1 | 1.1000 ± 0.0044 |" in text
    )
    assert "| KL divergence from the original, nats per token | 0 | 0.0512 |" in text
    assert "| same most likely token as the original | 100% | 87.5% |" in text
    assert "| decoding, tokens per second, batch 1 | – | 40.2 |" in text
    assert "`bfloat16`" in text
    assert "`A Processor`" in text
    row = "| `model.layers.0.mlp.up_proj` | `64 × 32` | `4 bit, groups of 64, symmetric` | `gptq` | 0.01235 |"
    assert row in text
    assert "- `model.layers.0.mlp.up_proj`: `no Hessian: rounded`" in text
    assert "in Kansas." in text
    assert "64 samples of 512 tokens" in text
    assert "method: gptq" in text


def test_a_licence_of_its_own_is_carried_over() -> None:
    terms = {"license": "other", "license_name": "llama3.2", "license_link": "https://example.org/llama/LICENSE"}
    text = card.render(full(source=full()["source"] | terms | {"gated": "manual"}))
    assert {key: metadata(text)[key] for key in terms} == terms
    assert "licensed under `other` (`llama3.2`)" in text
    assert "Access to the original is restricted" in text
    assert "names no licence" in card.render(full(source={}))


@pytest.mark.parametrize("evil", HOSTILE)
def test_a_hostile_licence_gets_nowhere(evil: str) -> None:
    terms = {"license": "other", "license_name": evil, "license_link": f"https://{evil}"}
    text = card.render(full(source=full()["source"] | terms))
    assert (metadata(text)["license_name"], metadata(text).get("license_link")) == ("unknown", None)
    assert set(metadata(text)) == set(metadata(card.render(full()))) | {"license_name"}
    assert outline(text)[1:3] == outline(card.render(full()))[1:3]


def test_the_template_goes_into_the_package() -> None:
    assert (card.TEMPLATES / "card.md.jinja").is_file()


@pytest.mark.parametrize(
    ("wire", "encodes", "says", "says_not"),
    [
        ("compressed_tensors", False, "`compressed-tensors` installed", "gptqmodel"),
        ("gptq", False, "`gptqmodel` installed", "`compressed-tensors`"),
        ("native", False, "without it, it does not", "without hfquant"),
        ("compressed_tensors", True, "stay packed", "transformers reads it too"),
        (None, False, "stay packed", "without"),
    ],
)
def test_loading_lines_fit_the_format(wire: str | None, encodes: bool, says: str, says_not: str) -> None:
    output = full()["output"] | {"encoder_decoder": encodes}
    text = card.render(full(wire={"format": wire}, output=output)).split("---\n", 2)[2]
    assert says in text
    assert says_not not in text
    assert "hfquant.load(folder)" in text


def test_a_native_model_is_not_announced_as_one_for_transformers() -> None:
    assert metadata(card.render(full(wire={"format": "native"})))["library_name"] == "hfquant"


def test_a_failed_gate_is_the_first_thing_said() -> None:
    text = card.render(full(gate={"passed": False, "limits": {"max_kl": 0.01}, "broken": ["KL is 0.0512"]}))
    assert text.index("did not pass its quality gate") < text.index("## How to load")
    assert "**Not passed.**" in text
    assert "`KL is 0.0512`" in text


def test_local_folders_are_not_published() -> None:
    source = {"id": "/home/somebody/models/mine", "revision": None, "bytes": 1000}
    text = card.render(full(source=source))
    assert "somebody" not in text
    assert "# `mine`, compressed with hfquant" in text
    assert "base_model" not in metadata(text)


def test_a_report_without_measurements_is_a_card() -> None:
    text = card.render({"schema": 1, "hfquant": "0.1.0"})
    assert "Not measured yet." in text
    assert "Not applied yet." in text
    assert "No calibration data was used." in text


def test_what_a_report_does_not_say_is_a_dash() -> None:
    text = card.render(full(source={}, layers=[{"name": "a"}], compression={"seconds": None}))
    assert "| weights on disk | – | 700 MB |" in text
    assert "| `a` | – | – | – | – | – | – |" in text


@pytest.mark.parametrize("form", ["compressed_tensors", "gptq", "native", "gguf", "onnx", "dense"])
def test_no_text_becomes_markup_in_the_card_of_any_format(form: str) -> None:
    usual = card.render(full(wire={"format": form}))
    for evil in HOSTILE:
        source = full()["source"] | {"id": evil, "revision": evil}
        changed = {"source": source, "sample": dict.fromkeys(("prompt", "original", "compressed"), evil)}
        text = card.render(full(wire={"format": form, "types": {evil: evil}}, **changed))
        assert outline(text)[0][1:] == outline(usual)[0][1:]
        assert outline(text)[1] == outline(usual)[1]
        assert metadata(text)["tags"] == metadata(usual)["tags"]
        assert metadata(text)["library_name"] == metadata(usual)["library_name"]


@pytest.mark.parametrize("evil", HOSTILE)
def test_no_text_of_a_model_becomes_markup(evil: str) -> None:
    good = full()
    bad = full(
        source={"id": evil, "revision": evil, "bytes": 2_000_000_000, "license": evil},
        recipe={"name": evil, evil: evil, "steps": [{"method": "gptq"}, {"method": evil}]},
        calibration=good["calibration"] | {"source": evil},
        layers=[good["layers"][0] | {"name": evil, "method": evil, "notes": [evil], "grid": evil}],
        output=good["output"] | {"architecture": evil, "model_type": evil},
        wire={"format": evil},
        evaluation=good["evaluation"] | {"settings": dict.fromkeys(good["evaluation"]["settings"], evil)},
        sample={"prompt": evil, "original": evil, "compressed": evil},
        gate={"passed": False, "limits": {evil: 3.0}, "broken": [evil]},
    )
    text = card.render(bad)
    headings, html, targets, tables = outline(text)
    usual, _, _, usual_tables = outline(card.render(good))
    assert headings[1:] == usual[1:]
    assert html == OURS
    assert targets == ["#gate", "https://arxiv.org/abs/2210.17323"]
    assert tables == usual_tables
    assert set(metadata(text)) == {"library_name", "tags", "model-index"}
    assert metadata(text)["tags"] == ["hfquant", "gptq"]
    [index] = metadata(text)["model-index"]
    assert index["name"] == "a model"
    assert {result["dataset"]["name"] for result in index["results"]} == {"a text"}
    assert not any(c in text for c in "\u202e\x00\x1b\u2028")


def test_only_the_links_meant() -> None:
    linked = outline(card.render(full()))[2]
    assert linked == ["https://huggingface.co/org/model-1B", "https://arxiv.org/abs/2210.17323"]


@pytest.mark.parametrize("name", [name for name in methods.NAMES if name != "rtn"])  # rounding has no paper
def test_the_paper_of_every_method_is_cited(name: str) -> None:
    text = card.render(full(recipe={"name": "mine", "steps": [{"method": "rtn"}, {"method": name}]}))
    [cited] = text.partition("\n## Papers\n\n- ")[2].strip().split("\n- ")
    said = str(import_module(f"hfquant.methods.{name}").__doc__)
    [number] = re.findall(r"arXiv:(\d{4}\.\d{4,5})", said.splitlines()[0])[:1]
    assert re.search(rf"\S.*: .+, \d{{4}}, \[arXiv:{number}\]\(https://arxiv\.org/abs/{number}\)$", cited)


def test_rounding_to_nearest_cites_nobody() -> None:
    assert "## Papers" not in card.render(full(recipe={"name": "rtn-w4", "steps": [{"method": "rtn"}]}))


def test_code_spans_and_fences_outlast_their_content() -> None:
    reader = MarkdownIt("commonmark")
    for evil in HOSTILE:
        [paragraph] = [t for t in reader.parse(code(evil)) if t.type == "inline"]
        assert [child.type for child in paragraph.children or []] == ["code_inline"]
        assert [t.type for t in reader.parse(fence(evil))] == ["fence"]
    assert fence("a\n\n  b").splitlines()[1:-1] == ["a", "", "  b"], "text is not changed without need"


def test_the_card_is_written_beside_the_report(tmp_path: Path) -> None:
    assert card.write(tmp_path, full()) == tmp_path / "README.md"
    assert (tmp_path / "README.md").read_text("utf-8") == card.render(full())


def pictured(**changes: Any) -> dict[str, Any]:
    files = [
        {"file": "figures/bits.png", "title": "Bits", "alt": "Bits per weight, 4.5 (all).", "about": "result"}
        | changes,
        {"file": "figures/rows.png", "title": "Rows", "alt": "Rows.", "about": "model"},
    ]
    return full(figures={"data": "figures/diagnosis.json", "files": files})


def test_figures_are_shown_with_words_for_those_who_cannot_see_them() -> None:
    text = card.render(pictured())
    assert "![Bits per weight, 4.5 (all).](figures/bits.png)" in text
    folded = text.index("How hard the original is to compress")
    assert text.index("figures/bits.png") < folded < text.index("figures/rows.png")


@pytest.mark.parametrize(
    "evil", [*HOSTILE, "x](https://evil.example) ![y", "figures/../x.png", "https://evil.example/x.png"]
)
def test_a_hostile_figure_gets_nowhere(evil: str) -> None:
    usual = outline(card.render(pictured()))
    assert outline(card.render(pictured(alt=evil, title=evil))) == usual
    without = outline(card.render(pictured(file=evil)))
    assert without[2] == [target for target in usual[2] if target != "figures/bits.png"]
    assert without[:2] == usual[:2]


def test_memory_while_decoding_is_in_the_table() -> None:
    used = {"generation_memory_bytes": 120_000_000, "reference_generation_memory_bytes": 540_000_000}
    text = card.render(full(evaluation=full()["evaluation"] | used))
    assert "| memory while decoding | 540 MB | 120 MB |" in text
    assert "memory while decoding" not in card.render(full())


def test_an_export_says_what_its_numbers_are_of() -> None:
    scores = {key: value for key, value in full()["evaluation"].items() if "tokens_per" not in key}
    text = card.render(full(wire={"format": "dense"}, evaluation=scores | {"measured_as": "gptq"}))
    assert "Measured in the format `gptq`, from which this one was made" in text
    assert "tokens per second" not in text
    assert "perplexity 11 instead of 10.**" in text


def test_the_outcome_is_said_at_once() -> None:
    assert "\n\n**700 MB instead of 2 GB (35%), perplexity 11 instead of 10.**\n\n## How to load\n" in card.render(
        full()
    )
    assert "**700 MB instead of 2 GB (35%).**" in card.render(full(evaluation=None))
    assert " instead of " not in card.render(full(source={}))


@pytest.mark.parametrize(
    ("grid", "changes", "may"),
    [
        ({}, {}, False),  # groups of 64 do not divide rows of 32
        ({"group_size": 32}, {}, True),
        ({"group_size": -1, "bits": 8}, {}, True),
        ({"group_size": -1, "bits": 8}, {"recipe": {"activations": {"bits": 8}}}, True),
        ({"group_size": 32}, {"recipe": {"activations": {"bits": 8}}}, False),
        ({"group_size": 32, "bits": 3}, {}, False),
        ({"group_size": 32, "symmetric": False}, {}, False),
        ({"group_size": 32}, {"wire": {"format": "native"}}, False),
        ({"group_size": 32}, {"output": {"encoder_decoder": True}}, False),
    ],
)
def test_vllm_is_named_only_where_it_has_kernels(grid: dict[str, Any], changes: dict[str, Any], may: bool) -> None:
    layer = full()["layers"][0]
    report = full(layers=[layer | {"grid": layer["grid"] | grid}], **changes)
    assert ("vllm serve" in card.render(report)) is may
    mixed = full(layers=[layer, layer | {"grid": layer["grid"] | {"bits": 8}}], **changes)
    assert "vllm serve" not in card.render(mixed)


def test_every_task_has_results_of_its_own() -> None:
    scores = {"acc": {"value": 0.5, "original": 0.6, "stderr": None}}
    asked = {name: {"n": 2, "source": "x", "scores": scores} for name in ("arc_easy", "piqa")}
    text = card.render(full(evaluation=full()["evaluation"] | {"tasks": asked}))
    results = metadata(text)["model-index"][0]["results"]
    named = [result["dataset"]["name"] for result in results]
    assert named == ["hfquant evaluation", "arc_easy, 2 questions", "piqa, 2 questions"]
    assert [len(result["metrics"]) for result in results] == [3, 1, 1]
