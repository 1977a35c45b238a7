"""`kvindexer config check`: what it reads is what `serve` reads, each fault is named once, and no secret is shown."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from pydantic import SecretStr

from kvindexer.access.identity import Grant
from kvindexer.cli import main
from kvindexer.errors import SettingsError, without_user
from kvindexer.hiding import HIDDEN
from kvindexer.settings import Settings, load_settings
from kvindexer.settings.shown import different, plain, shown
from kvindexer.types import SourceSpec
from servers import HOST, Server

Check = Callable[..., tuple[int, str, list[str]]]
SECRET = "marked-7f3a"
SOURCE = "instance=a,model=m,block_size=4,endpoint=tcp://10.0.0.1:1"


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Check:
    def run(*arguments: object) -> tuple[int, str, list[str]]:
        code = main(["config", "check", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err.splitlines()

    return run


def set_of(**values: object) -> list[str]:
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


def test_what_differs_from_the_defaults_is_shown_as_yaml_with_its_origin(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And read again it makes the same settings."""
    file = tmp_path / "kvindexer.yaml"
    file.write_text("max_sources: 7\nmax_candidates: 5\ntier_weights: {cpu: 0.5}\ndrain_s: 3.0\n")
    monkeypatch.setenv("KVINDEXER_MAX_BATCH", "9")
    code, out, problems = check("--config", file, "--port", 0, "--source", SOURCE, *set_of(max_candidates=6))
    assert (code, problems) == (0, [])
    assert "max_sources: 7  # file\n" in out
    assert "max_batch: 9  # variable\n" in out
    assert "max_candidates: 6  # flag\n" in out
    assert "drain_s" not in out
    assert out.endswith("# usable; settings that differ from their defaults: 6\n")
    again = load_settings(None, yaml.safe_load(out), {})
    assert again == load_settings(file, {"port": 0, "sources": [SOURCE], "max_candidates": 6, "max_batch": 9}, {})


def test_every_value_that_cannot_be_used_has_its_line(check: Check, tmp_path: Path) -> None:
    """Exit code 2; what is misspelled may be a secret, and is not shown."""
    code, out, problems = check(*set_of(max_sources=-1, max_batch="x", store_pasword=SECRET), "--port", "99999")
    assert code == 2
    named = [re.findall(r"setting (\w+):", line)[0] for line in problems]
    assert named == ["store_pasword", "max_sources", "max_batch", "port"]
    assert "did you mean store_password?" in problems[0]
    assert out == "# not usable: 4 problems\n"
    assert SECRET not in "".join(problems)
    file = tmp_path / "broken.yaml"
    file.write_text("a: [")
    assert check("--config", file)[0] == 2
    code, out, _ = check("--config", tmp_path / "none.yaml", "--json")
    assert code == 2
    (problem,) = json.loads(out)["problems"]
    assert (problem["setting"], "No such file" in problem["message"]) == ("config", True)


@pytest.mark.parametrize(
    ("values", "setting", "words"),
    [
        ({"tokenizers": "{m: {path: /none}, n: {path: /nil}}"}, "tokenizers.m", "a directory with tokenizer.json"),
        ({"auth_tokens_file": "/none"}, "auth_tokens_file", "No such file"),
        ({"discovery": "kubernetes", "discovery_kubeconfig": "/none"}, "discovery_kubeconfig", "/none not found"),
        ({"discovery": "kubernetes"}, "discovery", "a pod with a mounted service-account token"),
        ({"curve_secret_key_file": "/none"}, "curve_secret_key_file", "a CURVE key pair (No such file or directory)"),
        ({"tls_cert_file": "/none", "tls_key_file": "/none"}, "tls_cert_file", "No such file"),
    ],
)
def test_a_file_that_is_missing_is_named(check: Check, values: dict[str, str], setting: str, words: str) -> None:
    """Exit code 2, as that of `serve`: the values can be read, what they name can't be used."""
    code, out, problems = check(*set_of(**values))
    assert code == 2
    named = [line for line in problems if line.startswith(f"kvindexer: fail: setting {setting}: ")]
    assert len(named) == 1
    assert words in named[0]
    assert "# not usable" in out


def test_tokenizers_are_all_looked_at_and_tokens_never_shown(check: Check, tmp_path: Path) -> None:
    assert len(check(*set_of(tokenizers="{m: {path: /none}, n: {path: /nil}}"))[2]) == 2
    tokens = tmp_path / "tokens.yaml"
    tokens.touch(0o600)
    tokens.write_text(f"tokens: [{{name: x, token: {SECRET}-{SECRET}, roles: [query]}}]")
    code, out, problems = check(*set_of(auth_tokens_file=tokens))
    assert (code, problems) == (0, [])
    assert SECRET not in out
    tokens.write_text(f"tokens: [{{name: x, token: {SECRET}-{SECRET}, roles: [quarry]}}]")
    code, out, problems = check(*set_of(auth_tokens_file=tokens))
    assert code == 2
    assert len(problems) == 1
    assert SECRET not in out + problems[0]


def test_a_certificate_must_fit_its_key(check: Check, tmp_path: Path) -> None:
    authority = trustme.CA()
    one, other = (authority.issue_cert("localhost") for _ in range(2))
    ours, key, foreign = (tmp_path / name for name in ("cert.pem", "key.pem", "foreign.pem"))
    one.cert_chain_pems[0].write_to_path(ours)
    one.private_key_pem.write_to_path(key)
    other.private_key_pem.write_to_path(foreign)
    assert check(*set_of(tls_cert_file=ours, tls_key_file=key))[0] == 0
    code, _, problems = check(*set_of(tls_cert_file=ours, tls_key_file=foreign))
    assert code == 2
    assert "a PEM certificate that belongs to the key" in problems[0]
    pair = set_of(tls_cert_file=ours, tls_key_file=key)
    code, _, problems = check(*pair, *set_of(tls_client_ca_file=key))
    assert code == 2
    assert "setting tls_client_ca_file" in problems[0]


def test_sources_that_contradict_each_other_are_found_before_a_start_would_fail(check: Check) -> None:
    code, _, problems = check("--source", SOURCE, "--source", SOURCE.replace("0.1:1", "0.2:1"))
    assert code == 2
    assert "instance 'a' rank 0 of 'm' publishes at tcp://10.0.0.1:1" in problems[0]


@pytest.mark.parametrize(
    "wrong",
    [
        set_of(max_batch="x"),
        set_of(auth_tokens_file="/none"),
        ["--source", SOURCE, "--source", SOURCE.replace("0.1:1", "0.2:1")],
    ],
)
def test_serve_ends_with_the_same_code(check: Check, wrong: list[str]) -> None:
    """A value, a file that it names, and sources that can't be followed together."""
    command = [sys.executable, "-m", "kvindexer", "serve", "--port", "0", *wrong]
    served = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
    assert served.returncode == check("--port", 0, *wrong)[0] == 2


def test_the_store_is_asked_only_if_that_is_wanted(check: Check) -> None:
    """Exit code 1 if it does not answer: `serve` would start all the same."""
    with Server(password=SECRET) as server:
        url = f"redis://:{SECRET}@{HOST}:{server.port}"
        code, out, problems = check("--store", url, "--connect")
        assert code == 0
        assert SECRET not in out + "".join(problems)
        assert check("--store", url.replace(SECRET, "wrong"))[0] == 0
        code, out, problems = check("--store", url.replace(SECRET, "wrong"), "--connect")
        assert code == 1
        assert problems[0].startswith("kvindexer: down: setting store: redis://:***@")
    assert check("--store", url)[0] == 0
    code, _, problems = check("--store", url, "--connect")
    assert (code, len(problems)) == (1, 1)


# What may be shown


def test_no_secret_of_any_setting_is_shown() -> None:
    """Every field that may hold one is tried."""
    values: dict[str, Any] = {
        "store": f"redis://user:{SECRET}@h",
        "tokenizer_api_key": SECRET,
        "sources": [SourceSpec(instance="a", model="m", block_size=4, endpoint="tcp://a:1", additional_salt=SECRET)],
    }
    for chosen in (Settings(**values), Settings(store_password=SecretStr(SECRET))):
        assert SECRET not in json.dumps(shown(chosen))
        assert HIDDEN in json.dumps(different(chosen)) or "***" in json.dumps(different(chosen))
    for name in ("otlp_endpoint", "auth_kubernetes_api"):
        with pytest.raises(SettingsError) as caught:
            load_settings(None, {name: f"http://user:{SECRET}@collector:4318"}, {})
        assert SECRET not in str(caught.value)
    assert SECRET not in str(plain({"x": Grant(cache_salt=SECRET)}))


def test_a_new_setting_with_a_secret_has_a_type_that_hides_it() -> None:
    """Or is a file, whose path is none."""
    named = re.compile(r"password|secret|salt|api_key|credential")
    for name, field in Settings.model_fields.items():
        if named.search(name) and not name.endswith("_file"):
            assert "SecretStr" in str(field.annotation), name


def test_a_value_of_an_unknown_kind_is_hidden() -> None:
    assert plain(object()) == HIDDEN
    assert plain(SecretStr("x")) == HIDDEN
    assert without_user("see http://a:b@h/ and redis://c@h") == "see http://***@h/ and redis://***@h"
    assert json.loads(json.dumps(shown(Settings())))["port"] == 8090
