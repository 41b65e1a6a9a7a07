"""`cliplet VERB …`: finds the verbs, turns errors into one clear message and an exit code.

A verb is a click command that a folder offers as an entry point of the group `cliplet.commands`; it is
imported when it is used, so `cliplet --help` costs nothing and a missing extra costs only its verb.

Exit codes: 0 ok · 1 error · 2 usage · 3 parity failed · 4 error rate or latency objective exceeded ·
130 interrupted with the work saved.
"""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points

import click

from cliplet import __version__
from cliplet.errors import INTERRUPTED, ClipletError, EnvironmentError_

# The order in which a user meets them.
VERBS = {
    "doctor": "Say what this machine can do, and what to install for the rest.",
    "demo": "Make scenes, label them with the embedded model and open a gallery: two minutes.",
    "label": "Label a collection of images.",
    "gallery": "Make one HTML page of labelled images.",
    "scenes": "Make images with exactly known contents, to test and train on.",
    "train": "Train a classifier from images without labels, by a recipe.",
    "eval": "Measure a model on labelled images, with pictures.",
    "calibrate": "Find the score of each class from which on a model should tag it.",
    "export": "Turn a model into a bundle of engines, each proven to agree with it.",
    "verify": "Compare a bundle's engines with the original again, on this machine.",
    "inspect": "Say what a bundle, a graph, an engine or a folder of labels holds.",
    "serve": "Serve bundles on a Triton server on this machine, with a page to try them.",
    "bench": "Measure a model: speed by phase, memory, latency, against the machine's limits.",
}


class Verbs(click.Group):
    """A group whose commands are entry points."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        found = _entry_points()
        return [v for v in VERBS if v in found] + sorted(v for v in found if v not in VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = _entry_points().get(cmd_name)
        if found is None:
            return None
        command: click.Command = found.load()
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            close = difflib.get_close_matches(name, self.list_commands(ctx), 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            ctx.fail(f"No such verb {name!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One line a verb, without importing any."""
        with formatter.section("Verbs"):
            formatter.write_dl([(name, VERBS.get(name, "")) for name in self.list_commands(ctx)])


def _entry_points() -> dict[str, EntryPoint]:
    return {e.name: e for e in entry_points(group="cliplet.commands")}


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version", message="cliplet %(version)s")
def cliplet() -> None:
    """Turn class names and unlabelled images into a multi-label tagger that runs anywhere.

    Every option is also an environment variable: --batch-size of `label` is CLIPLET_LABEL_BATCH_SIZE.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code and never lets an expected error through as a traceback."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("cliplet").setLevel(logging.INFO)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = cliplet.main(arguments, "cliplet", standalone_mode=False, auto_envvar_prefix="CLIPLET")
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except ClipletError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except ModuleNotFoundError as error:
        lacking = EnvironmentError_(
            f"this needs the library {error.name!r}, which is not installed",
            "the extra of cliplet that brings it",
            "`cliplet doctor` names it; pip install 'cliplet[edge]' is what labelling needs",
        )
        click.echo(f"error: {lacking}", err=True)
        return lacking.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left (`cliplet … | head`); nobody is there to tell.
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
