"""The command line itself: verbs, help, exit codes, and how errors look."""

from __future__ import annotations

from dataclasses import fields

import click
import pytest
from helpers import Cli

from cliplet import __version__
from cliplet.cli import VERBS, cliplet, main
from cliplet.deploy.label import LabelJob
from cliplet.errors import ArtifactError, ClipletError, ObjectiveError, ParityError, UsageError
from cliplet.plan import TaggerSettings


def test_help_lists_every_verb_with_its_line(cli: Cli) -> None:
    done = cli("--help")
    assert done.returncode == 0
    for verb, line in VERBS.items():
        assert verb in done.stdout
        assert line.split()[0] in done.stdout


def test_every_verb_loads_and_documents_every_option() -> None:
    context = click.Context(cliplet)
    for verb in VERBS:
        command = cliplet.get_command(context, verb)
        assert command is not None and command.help, verb
        for parameter in command.params:
            if isinstance(parameter, click.Option) and parameter.name not in ("out", "version"):
                assert parameter.help, f"{verb} {parameter.name}"


def test_the_options_of_label_have_the_defaults_of_the_settings() -> None:
    """They are written twice, because `--help` must not import what the settings need."""
    command = cliplet.get_command(click.Context(cliplet), "label")
    assert command is not None
    options = command.make_context("label", ["photos"]).params
    own = {f.name: f.default for kind in (TaggerSettings, LabelJob) for f in fields(kind)}
    shared = options.keys() & own.keys() - {"out", "sources"}
    assert len(shared) > 15
    assert {name: options[name] for name in shared} == {name: own[name] for name in shared}


def test_the_version(cli: Cli) -> None:
    assert cli("--version").stdout == f"cliplet {__version__}\n"


def test_a_verb_that_is_misspelt(cli: Cli) -> None:
    done = cli("lable")
    assert done.returncode == 2
    assert "Did you mean 'label'?" in done.stderr


def test_an_option_that_is_misspelt(cli: Cli) -> None:
    done = cli("gallery", "x", "--limt", "3")
    assert done.returncode == 2
    assert "--limit" in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ClipletError("it broke", "it whole", "mend it"), 1),
        (UsageError("asked"), 2),
        (ParityError("differs"), 3),
        (ObjectiveError("too slow"), 4),
        (ArtifactError("old"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_a_message_and_a_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cliplet, "invoke", fails)
    assert main(["label", "x"]) == code
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    if code == 1 and isinstance(error, ClipletError) and error.fix:
        assert shown == "error: it broke\nexpected: it whole\nfix: mend it\n"


def test_a_verb_whose_extra_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Missing:
        name = "label"

        def load(self) -> None:
            raise ModuleNotFoundError("no", name="pyarrow")

    monkeypatch.setattr("cliplet.cli._entry_points", lambda: {"label": Missing()})
    assert main(["label", "x"]) == 1
    assert "the library 'pyarrow', which is not installed" in capsys.readouterr().err
