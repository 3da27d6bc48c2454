"""Every YAML loads, and every wrong configuration gives one line before anything runs."""

from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scmoe.command_line import call
from scmoe.config.as_yaml import changes_to_yaml, to_yaml
from scmoe.config.derived import resolve_ep_size
from scmoe.config.fields import Config, LoggerConfig
from scmoe.config.leaves import ConfigError, flatten, four_digits
from scmoe.config.load import load_config, load_text
from tests.support.configs import IMPOSSIBLE


def refusal(path: Path | None, *overrides: str) -> str:
    """Return the one error line of a refused configuration."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


# What loads


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"])).filter(
    lambda text: "${" not in text and text not in ("", "~", "null", "None", "???")
)
seconds = st.floats(min_value=10, max_value=1e6)


@given(st.text())
def test_every_config_error_is_one_line(message):
    assert len(str(ConfigError(f"data.path: {message}")).splitlines()) == 1


@settings(max_examples=25, deadline=None)
@given(names, texts, st.none() | texts, st.lists(texts), st.integers(0, 2**32 - 1), seconds)
def test_any_text_and_number_survives_saving(
    tmp_path_factory, name, runs_dir, group, tags, seed, timeout_s
):
    logger = LoggerConfig(group=group, tags=tags)
    config = Config(
        name=name,
        runs_dir=runs_dir,
        seed=seed,
        logger=logger,
        strategy=type(Config.strategy)(None, timeout_s),
    )
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(to_yaml(config), encoding="utf-8", newline="")
    assert load_config(path) == config


def test_an_empty_mapping_has_the_defaults_and_an_empty_file_is_refused(write):
    assert load_config(None) == load_config(write("defaults.yaml", "{}\n")) == Config()
    for text in ("", "# nothing\n"):
        assert "the file is empty" in refusal(write("empty.yaml", text))
    with pytest.raises(FrozenInstanceError):
        load_config(None).seed = 2


def test_a_large_number_is_written_with_all_its_digits():
    assert [four_digits(x) for x in (86020.4, 1234.5, 0.00012345)] == [
        "86,020",
        "1,234",
        "0.0001234",
    ]


def test_a_preset_is_found_by_its_bare_name_and_what_is_suggested_is_found():
    assert (
        load_config("longcat_flash")
        == load_config("model/longcat_flash")
        == load_config("longcat_flash.yaml")
    )
    suggested = refusal("slow_netwrk").partition("did you mean ")[2].partition("?")[0]
    assert load_config(suggested) == load_config("experiment/slow_network")


def test_a_later_source_overrides_an_earlier_one(write):
    """`extends` is relative to its file, and can be nested."""
    write("base.yaml", "seed: 1\nmodel: {layers: 2, dim: 64}\noptim: {lr: 1}\n")
    write("named.yaml", "name: big\nmodel: {layers: 3, dim: 128}\n")
    write("model/big.yaml", "extends: ../named.yaml\nmodel: {layers: 6}\n")
    path = write(
        "own/own.yaml", "extends: [../base.yaml, ../model/big.yaml]\nmodel: {layers: 8}\nmoe: {}\n"
    )
    config = load_config(path, ["seed=3", "--seed=4"])
    assert (config.optim.lr, config.model.dim, config.model.layers, config.seed) == (1.0, 128, 8, 4)
    assert config.name == "big"


def test_an_entry_of_a_mapping_replaces_what_an_earlier_source_has_there():
    words = ("extensions=[json]", "options={a: {b: 1}, c: {d: 1}}", "options.a={}", "options.c=[2]")
    assert load_config(None, words).options == {"a": {}, "c": [2]}


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.lr=1e-3", "optim.lr", 0.001),
        ("trainer.gradient_clip=2", "trainer.gradient_clip", 2.0),
        ("moe.capacity_factor=null", "moe.capacity_factor", None),
        ("moe.capacity_factor=None", "moe.capacity_factor", None),
        ("logger.group=", "logger.group", None),
        ("logger.tags=[a, b]", "logger.tags", ["a", "b"]),
        ("logger.tags=[]", "logger.tags", []),
        (
            "trainer.extra={a: 1, b: {c: [1.5, x, true]}}",
            "trainer.extra",
            {"a": 1, "b": {"c": [1.5, "x", True]}},
        ),
        ("trainer.extra.max_time=00:01:00:00", "trainer.extra", {"max_time": "00:01:00:00"}),
        ("moe.noisy=True", "moe.noisy", True),
        ("moe.noisy=false", "moe.noisy", False),
        ("moe={every: 1, position: pos1}", "moe.every", 1),
        ("name=007", "name", "007"),  # a string stays as it was typed
        ("name=1e3", "name", "1e3"),
        ("name=yes", "name", "yes"),
        ("runs_dir=a=b", "runs_dir", "a=b"),
    ],
)
def test_a_value_gets_the_type_of_its_field(override, key, value):
    found = flatten(load_config(None, [override]))[key]
    assert found == value and type(found) is type(value)


def test_expert_parallel_ranks_by_default():
    assert resolve_ep_size(load_config(None, ["moe.num_experts=12", "trainer.devices=8"])) == 4
    assert resolve_ep_size(load_config(None, ["moe.architecture=dense", "trainer.devices=8"])) == 1
    assert resolve_ep_size(load_config(None, ["strategy.ep_size=2", "trainer.devices=8"])) == 2


# What is refused


@pytest.mark.parametrize(
    ("key", "overrides"), IMPOSSIBLE, ids=[overrides for _, overrides in IMPOSSIBLE]
)
def test_impossible_combination_names_its_key(key, overrides):
    line = refusal(None, *overrides.split())
    assert line.startswith(f"command line: {key} is ")


@pytest.mark.parametrize(
    "overrides",
    [
        "moe.every=1 moe.architecture=top_k",
        "moe.every=1 moe.architecture=top_k moe.position=pos1 analysis.gating_every=5",
        "moe.every=1 moe.position=pos2 analysis.gating_every=5",
        "moe.every=1 moe.position=pos1 model.layers=3 schedule.slot=2",
        "moe.architecture=dense model.layers=3",
        "schedule.slot=4 moe.position=pos3 moe.tap_norm=shared",
        "strategy.ep_size=4 trainer.devices=2 trainer.num_nodes=2",
        "data.name=text data.path=somewhere",
    ],
)
def test_possible_combination_passes(overrides):
    load_config(None, overrides.split())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "command line: unknown key 'optim.lrr', did you mean optim.lr?"),
        ("lr=1", "did you mean optim.lr?"),
        ("model.top_k=1", "did you mean moe.top_k?"),
        ("schedule=foo", "schedule is 'foo', allowed: auto or a mapping of keys to values"),
        ("name=", "name is '', allowed: a text that is not empty"),
        ("optim.lr=fast", "optim.lr is 'fast', allowed: float, above 0"),
        ("model.layers=2.5", "model.layers is 2.5, allowed: int"),
        ("model.layers=null", "model.layers is null, allowed: int"),
        ("model.layers=[1]", "model.layers is ['1'], allowed: int"),
        ("moe.position=pos4", "moe.position is 'pos4', allowed: pos1 | pos2 | pos3"),
        ("moe.noisy=7", "moe.noisy is 7, allowed: true | false"),
        ("moe.every=3", "moe.every is 3, allowed: 1 | 2 | 4"),
        ("moe.every=true", "moe.every is true, allowed: 1 | 2 | 4"),
        ("model.layers=x", "model.layers is 'x', allowed: int"),
        ("logger.tags=a", "logger.tags is 'a', allowed: list[str]"),
        ("trainer.extra=a", "trainer.extra is 'a', allowed: mapping"),
        (
            "trainer.extra.a='${oc.env:HOME}'",
            "trainer.extra.a is '${oc.env:HOME}', allowed: plain values and lists",
        ),
        ("logger.group={}", "logger.group is {}, allowed: str | null"),
        ("optim=3", "optim is 3, allowed: a mapping"),
        ("seed", "'seed' has no value"),
        ("extends=base.yaml", "unknown key 'extends'"),
        ("name=[a", "bad YAML"),
        ("data.path=/data/set #1", "data.path ends with '#1', which YAML reads as a comment"),
        ("name=???", "name is '???'"),
        ("_target_=os.system", "unknown key '_target_'"),
        (
            "name=${oc.env:HOME}",
            "name is '${oc.env:HOME}', allowed: a text that is not empty; no interpolation",
        ),
        ("logger.tags=[a, '${oc.env:HOME}']", "logger.tags is ['a', '${oc.env:HOME}']"),
    ],
)
def test_bad_override(override, message):
    assert message in refusal(None, override)


def test_a_truth_is_shown_as_it_is_written():
    refused = refusal(None, "trainer.compile=true", "schedule.inside_attention=true")
    assert "schedule.inside_attention is true, allowed: false" in refused


SECRET = "root:$6$secret:19700:0:99999:7:::"


@pytest.mark.parametrize("verb", ["train", "sweep", "advise"])
@pytest.mark.parametrize(
    "text", [f"{SECRET}\ndaemon:*:19700\n", f"- {SECRET}\n", f"a: [{SECRET}\n", f"'{SECRET}\n"]
)
def test_a_file_of_another_form_is_refused_without_a_word_of_its_content(text, verb, write, capsys):
    file = str(write("shadow", text))
    words = ["quickstart", f"cluster={file}"] if verb == "advise" else [file]
    assert call(verb, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert file in line and "secret" not in line and "daemon" not in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "must be a mapping"),
        ("word\n", "must be a mapping"),
        ("optim: [1]\n", "optim is ['1'], allowed: a mapping"),
        ("optim:\n", "optim is '', allowed: a mapping"),
        ("optim: {lrr: 1}\n", "did you mean optim.lr?"),
        ("seed: 1\nseed: 2\n", "line 2: bad YAML: seed comes twice"),
        ("optim: {lr: 1}\noptim.lr: 2\n", "optim.lr comes twice"),
        ("seed: [1\n", "bad YAML"),
        ("seed: 1\n\tname: a\n", "bad YAML"),
        ("seed: 1\n---\nseed: 2\n", "bad YAML"),
        ("? [a]\n: 1\n", "bad YAML"),
        ("name: \x00\n", "bad YAML"),
        ("name: " + "[" * 500 + "\n", "bad YAML"),
        ("a: &a [x]\nlogger: {tags: *a}\n", "line 1: tags (!), anchors (&)"),
        ("name: !!python/object/apply:os.system [ls]\n", "line 1: tags"),
        ("extends: {a: b}\n", "extends is {'a': 'b'}"),
        ("extends: [[a]]\n", "extends is [['a']]"),
        ("extends: absent.yaml\n", "absent.yaml, which "),
        ('extends: "a\\0b"\n', "cannot be read"),
        ("extends: .\n", "cannot be read"),
    ],
)
def test_bad_file_is_named(write, text, message):
    line = refusal(write("bad.yaml", text))
    assert "bad.yaml" in line and message in line


def test_a_missing_or_binary_file_or_a_circle_is_refused(tmp_path, write):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("absent.yaml", "binary.yaml"):
        assert f"{name}: cannot be read" in refusal(tmp_path / name)
    write("a.yaml", "extends: b.yaml\n")
    assert "extends itself" in refusal(write("b.yaml", "extends: a.yaml\n"))
    assert "extends itself" in refusal(write("self.yaml", "extends: ./self.yaml\n"))


def test_stage_4_of_swin_reads_renormalise_where_stage_3_keeps_one_expert():
    config = load_config("quickstart_vision", ["moe.renormalise=false"])
    assert config.moe.top_k == 1 and not config.moe.renormalise
    assert "moe.renormalise" in refusal(None, "moe.renormalise=false")


@pytest.mark.parametrize("overrides", ["model.layers=1", "moe.every=4 model.layers=2"])
def test_too_few_layers_are_named_and_not_dense_blocks_that_nobody_has_set(overrides):
    line = refusal(None, *overrides.split())
    assert line.startswith("command line: model.layers is ") and "a multiple of moe.every" in line


def test_an_infinite_option_survives_saving():
    extension = "extensions=[json]"
    config = load_config(None, [extension, "options.most=inf", "options.least=-inf"])
    assert load_text(to_yaml(config), "kept", [extension]) == config
    assert config.options == {"most": float("inf"), "least": float("-inf")}


def test_a_text_that_looks_like_another_value_survives_saving_and_stands_in_quotes(write):
    extension = "extensions=[json]"
    texts = {"a": "007", "b": "1e3", "c": "true", "d": "null", "e": "", "f": "nan", "g": ["1.10"]}
    config = replace(Config(), extensions=["json"], options=texts)
    assert load_text(to_yaml(config), "kept", [extension]).options == texts
    assert load_text(changes_to_yaml(config), "kept", [extension]).options == texts
    file = write("o.yaml", "extensions: [json]\noptions: {version: '1.10', 'most': 1.10}\n")
    assert load_config(file, ["options.tag='007'"]).options == {
        "version": "1.10",
        "most": 1.1,
        "tag": "007",
    }
