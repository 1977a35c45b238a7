"""Settings: precedence of the layers, and one kind of error that names key, value and expectation."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kvindexer.errors import SettingsError
from kvindexer.settings import Settings, load_settings
from kvindexer.settings.source import ALIASES, parse_source
from kvindexer.settings.table import markdown_tables
from kvindexer.types import SourceSpec

ROOT = Path(__file__).parent.parent
POD_A = SourceSpec(instance="pod-a", model="m", block_size=16, endpoint="tcp://10.0.0.1:5557")
TEXT_A = "instance=pod-a,model=m,block_size=16,endpoint=tcp://10.0.0.1:5557"


def write(tmp_path: Path, text: str) -> Path:
    config = tmp_path / "kvindexer.yaml"
    config.write_text(text, encoding="utf-8")
    return config


def refused(
    overrides: dict[str, Any], config: Path | None = None, environ: dict[str, str] | None = None
) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        load_settings(config, overrides, environ or {})
    assert "\n" not in str(caught.value)
    return caught.value


def test_defaults_listen_on_the_own_machine_only() -> None:
    settings = load_settings(None, {}, {})
    assert (settings.host, settings.port) == ("127.0.0.1", 8090)


def test_a_higher_layer_wins(tmp_path: Path) -> None:
    config = write(tmp_path, "max_candidates: 2\nmax_sources: 2\n")
    environ = {"KVINDEXER_MAX_CANDIDATES": "1", "KVINDEXER_MAX_SOURCES": "1", "KVINDEXER_MAX_CONCURRENT_REPLAYS": "1"}
    settings = load_settings(config, {"max_candidates": "3"}, environ)
    assert (settings.max_candidates, settings.max_sources, settings.max_concurrent_replays) == (3, 2, 1)


def test_the_constructor_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVINDEXER_PORT", "1")
    assert Settings().port == 8090


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("port", "abc", "a whole number from 0 to 65535"),
        ("port", 65536, "65535"),
        ("port", -1, "0"),
        ("port", True, "a number"),
        ("port", None, "a whole number"),
        ("port", "9" * 5000, "a whole number"),
        ("max_sources", 0, "a whole number from 1 to 2147483647"),
        ("max_sources", 1.5, "a whole number"),
        ("receive_hwm", 2**31, "a whole number from"),
        ("replay_timeout_s", math.nan, "a number of seconds above 0 and at most 604800"),
        ("replay_timeout_s", "inf", "at most 604800"),
        ("replay_timeout_s", "30s", "a number of seconds above 0"),
        ("gone_after_s", 1e9, "at most"),
        ("slice_ms", 0, "a number of milliseconds above 0"),
        ("log_level", "loud", "'debug'"),
        ("host", "", "some text"),
        ("replica", "a b", "letters, digits"),
        ("allowed_endpoints", "[", "YAML"),
        ("media", ["x"], "a map, as `{name: value}`"),
        ("sources", 7, "a list of sources"),
    ],
)
def test_an_unusable_value_is_named(key: str, value: object, expected: str) -> None:
    error = refused({key: value})
    assert error.key == key
    assert expected in error.expected


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"tier_weights": {"gpu": -1}}, "tier_weights.gpu"),
        ({"tier_weights": {"tape": 1}}, "tier_weights.tape"),
        ({"media": {"NVME": "tape"}}, "media.NVME"),
        ({"replay_retry_max_s": 0.1}, "replay_retry_max_s"),
        ({"stale_after_s": 1}, "stale_after_s"),
        ({"gone_after_s": 1}, "gone_after_s"),
        ({"sources": [TEXT_A, TEXT_A.replace("pod-a", "pod-b")]}, "sources[1].endpoint"),
        ({"sources": [TEXT_A.replace("tcp://", "ipc://")]}, "sources[0].endpoint"),
        ({"sources": [TEXT_A], "allowed_endpoints": ["tcp://10.1.*"]}, "sources[0].endpoint"),
        ({"sources": [7]}, "sources[0]"),
    ],
)
def test_values_that_do_not_fit_together_are_named(overrides: dict[str, Any], key: str) -> None:
    assert refused(overrides).key == key


def test_an_unknown_setting_is_named_with_the_nearest_known_one(tmp_path: Path) -> None:
    file = write(tmp_path, "max_source: 1\n")
    assert str(refused({}, file)) == (
        f"setting max_source: there is no such setting; did you mean max_sources? (file {file})"
    )
    assert str(refused({}, environ={"KVINDEXER_PROT": "1"})) == (
        "setting prot: there is no such setting; did you mean port? (variable KVINDEXER_PROT)"
    )
    assert str(refused({"nonsense": 1})) == (
        "setting nonsense: there is no such setting; docs/settings.md lists them"
    )
    for spelling in ("max-sources", "MAX_SOURCES", "Max-Source"):
        assert "did you mean max_sources?" in str(refused({}, write(tmp_path, f"{spelling}: 1\n")))


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        (
            "sources",
            [{"instance": "a", "modle": "m"}],
            "sources[0].modle: there is no such field; did you mean model?",
        ),
        ("sources", [{"instance": "a"}], "sources[0].model: nothing is set, expected a value: it has no default"),
        ("tier_weights", {"gpuu": 1}, "tier_weights.gpuu: there is no such tier; did you mean gpu?"),
        ("tier_weights", {"x": 1}, "tier_weights.x: there is no such tier; known are gpu, cpu, disk, remote"),
        ("tokenizers", {"m": {"paht": "/x"}}, "tokenizers.m.paht: there is no such field; did you mean path?"),
        (
            "auth_certificates",
            {"*": {"role": ["query"]}},
            "auth_certificates.*.role: there is no such field; did you mean roles?",
        ),
    ],
)
def test_an_unknown_name_inside_a_setting_is_named_with_the_nearest_known_one(
    setting: str, value: object, said: str
) -> None:
    assert str(refused({setting: value})) == f"setting {said}"


def test_an_error_says_where_the_value_was_given(tmp_path: Path) -> None:
    """In a file, in a variable; a flag stands on the same screen."""
    file = write(tmp_path, "tier_weights: {gpu: -1}\n")
    assert str(refused({}, file)).endswith(f"-1 is not usable, expected a number at least 0 (file {file})")
    assert str(refused({}, environ={"KVINDEXER_PORT": "x"})).endswith("from 0 to 65535 (variable KVINDEXER_PORT)")
    assert str(refused({"port": "x"})).endswith("from 0 to 65535")
    assert str(refused({"port": "x"}, None, {"KVINDEXER_PORT": "y"})).endswith("to 65535")


def test_what_is_no_map_of_settings_is_said(tmp_path: Path) -> None:
    for text, found in (("port 8090\n", "text"), ("- port\n", "a list"), ("7\n", "a single value")):
        assert refused({}, write(tmp_path, text)).expected.endswith(f"`name: value` in each line; it is {found}")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "it is no UTF-8 text" in refused({}, binary).expected


def test_variables_that_kubernetes_sets_for_a_service_of_our_name_are_passed_over() -> None:
    environ = {
        "KVINDEXER_PORT": "tcp://10.0.0.11:8090",
        "KVINDEXER_SERVICE_HOST": "10.0.0.11",
        "KVINDEXER_SERVICE_PORT_HTTP": "8090",
        "KVINDEXER_PORT_8090_TCP_ADDR": "10.0.0.11",
        "KVINDEXER_REDIS_PORT": "tcp://10.0.0.12:6379",
    }
    assert load_settings(None, {}, environ) == Settings()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("port: [", "line 1, column 8"),
        ("port: 1\nport: 2\n", "port stands there twice"),
        ("- port\n", "a YAML map"),
        ("? [1]\n: 2\n", "YAML"),
        ("[" * 5000, "YAML"),
    ],
)
def test_a_file_that_is_no_yaml_map_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    error = refused({}, write(tmp_path, text))
    assert error.key == "config"
    assert expected in error.expected


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert refused({}, tmp_path / "none.yaml").key == "config"
    assert refused({}, tmp_path).key == "config"
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\xd8\x00")
    assert refused({}, binary).key == "config"


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_settings(write(tmp_path, "# nothing\n"), {}, {}) == Settings()


def test_sources_are_read_alike_from_every_layer(tmp_path: Path) -> None:
    listed = "[{instance: pod-a, model: m, block_size: 16, endpoint: 'tcp://10.0.0.1:5557'}]"
    assert load_settings(write(tmp_path, f"sources: {listed}\n"), {}, {}).sources == (POD_A,)
    assert load_settings(None, {}, {"KVINDEXER_SOURCES": listed}).sources == (POD_A,)
    assert load_settings(None, {"sources": (TEXT_A,)}, {}).sources == (POD_A,)
    assert load_settings(None, {"sources": (POD_A,)}, {}).sources == (POD_A,)


def test_spellings_of_the_http_contract_are_accepted() -> None:
    text = (
        "instance_id=pod-a,modelname=m,block_size=32,endpoint=tcp://h:1,replay_endpoint=tcp://h:2,dp_rank=3,"
        "lora_name=l,additionalsalt=s,tenant_id=t,type=Store,tier=disk,readers=pod-a+pod-b,durable_tiers="
    )
    assert parse_source(text) == SourceSpec(
        instance="pod-a",
        model="m",
        block_size=32,
        endpoint="tcp://h:1",
        replay="tcp://h:2",
        rank=3,
        lora="l",
        additional_salt="s",
        tenant="t",
        type="store",
        tier="disk",
        readers=("pod-a", "pod-b"),
        durable_tiers=(),
    )


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", "source"),
        ("pod-a", "source"),
        ("instance=pod-a", "source.model"),
        (TEXT_A + ",model=n", "source.model"),
        (TEXT_A + ",model_name=n", "source.model_name"),
        (TEXT_A + ",colour=red", "source.colour"),
        (TEXT_A + ",rank=-1", "source.rank"),
        (TEXT_A + ",rank=one", "source.rank"),
        (TEXT_A + ",type=trt", "source.type"),
        (TEXT_A + ",tier=tape", "source.tier"),
        (TEXT_A + ",durable_tiers=tape", "source.durable_tiers"),
        (TEXT_A + ",replay=5558", "source.replay"),
        (TEXT_A + ",replay=tcp://10.0.0.1:5557", "source.replay"),
        (TEXT_A.replace("=16", "=0"), "source.block_size"),
        (TEXT_A.replace("10.0.0.1", "*"), "source.endpoint"),
        (TEXT_A.replace(":5557", ":99999"), "source.endpoint"),
        (TEXT_A.replace("pod-a", ""), "source.instance"),
    ],
)
def test_an_unusable_source_names_its_field(text: str, key: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_source(text)
    assert caught.value.key == key


def test_salts_are_hidden_in_repr_and_errors() -> None:
    settings = Settings(sources=(parse_source(TEXT_A + ",additional_salt=pepper"),))
    assert settings.sources[0].additional_salt == "pepper"
    assert "pepper" not in repr(settings)
    assert "pepper" not in str(settings)
    with pytest.raises(SettingsError) as caught:
        parse_source(TEXT_A + ",additional_salt=pepper,additionalsalt=pepper2")
    assert "pepper" not in str(caught.value)


def test_an_error_repeats_only_the_start_of_a_long_value() -> None:
    assert len(str(refused({"port": "x" * 100_000}))) < 500


def test_weights_and_media_add_to_what_is_built_in() -> None:
    settings = load_settings(None, {"tier_weights": "{cpu: 0.5}", "media": '{"nvme": "disk"}'}, {})
    assert settings.tier_weights == {"gpu": 1.0, "cpu": 0.5, "disk": 0.4, "remote": 0.2}
    assert settings.media == {"NVME": "disk"}


def test_allowed_endpoints_are_patterns() -> None:
    settings = Settings(allowed_endpoints=("tcp://10.0.*", "ipc:///run/kv-?"))
    assert settings.allows("tcp://10.0.3.4:5557")
    assert settings.allows("ipc:///run/kv-1")
    assert not settings.allows("tcp://10.1.3.4:5557")
    assert not Settings().allows("inproc://kv")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(Settings.model_fields)), VALUES, min_size=1, max_size=3))
def test_whatever_the_values_only_a_settings_error_escapes(overrides: dict[str, Any]) -> None:
    try:
        load_settings(None, overrides, {})
    except SettingsError as error:
        assert "\n" not in str(error)  # noqa: PT017 - the property is about the errors that do escape


@given(st.text(max_size=60) | st.text(alphabet="=,+:/inpostance0123", max_size=60))
def test_whatever_the_text_of_a_source_only_a_settings_error_escapes(text: str) -> None:
    with pytest.raises(SettingsError):
        parse_source(text)


@pytest.mark.parametrize("page", ["README.md", "docs/settings.md"])
def test_the_examples_of_the_documentation_can_be_used(page: str, tmp_path: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    (example,) = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert load_settings(write(tmp_path, example), {}, {}).sources
    for flag in re.findall(r"--source (\S+,\S+)", text):
        parse_source(flag)


def test_every_field_of_a_source_is_documented() -> None:
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    table = text[text.index("\n## Sources\n") :]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(SourceSpec.__dataclass_fields__)
    assert all(f"`{alias}`" in table for alias in ALIASES)


def test_the_documented_table_is_what_the_code_says() -> None:
    documented = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert markdown_tables() in documented
