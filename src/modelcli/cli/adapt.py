"""The command adapt: the four usual adaptations of a model, without naming a path."""

from typing import Annotated

import typer

from modelcli.cli import output, progress
from modelcli.cli.mounting import Command
from modelcli.cli.options import EditOptions, OutputOptions, SourceOptions, exit_codes, writes_file
from modelcli.cli.outcome import show_outcome, tell_waiting, write_request
from modelcli.errors import RequestError

#: The largest number that the options accept. A tensor with a larger dimension would not fit in memory.
_LARGEST = 2**31 - 1


def _size(flag: str, help_text: str) -> typer.models.OptionInfo:
    made: typer.models.OptionInfo = typer.Option(flag, help=help_text, metavar="N", min=1, max=_LARGEST)
    return made


def adapt(
    edit: EditOptions,
    source: SourceOptions,
    options: OutputOptions,
    classes: Annotated[
        int | None, _size("--classes", "New classifiers, auxiliary ones too, for so many classes.")
    ] = None,
    in_channels: Annotated[
        int | None, _size("--in-channels", "Images with so many channels; the first convolution keeps what it knows.")
    ] = None,
    image_size: Annotated[
        int | None, _size("--image-size", "Square images of this size; position embeddings are interpolated.")
    ] = None,
    vocab_size: Annotated[
        int | None, _size("--vocab-size", "So many tokens; old rows of the embeddings are kept.")
    ] = None,
) -> None:
    """Adapt a model to other classes, images or tokens. The edits that this stands for are shown and recorded.

    modelcli adapt --classes 10 -m resnet18 -o head10.pth

    modelcli adapt --classes 10 --in-channels 1 --image-size 384 -m vit_b_16
    """
    from modelcli.commands.adapt import AdaptRequest
    from modelcli.commands.adapt import adapt as carry_out
    from modelcli.commands.target import find_target, recipe_locked
    from modelcli.edits.adaptation import Adaptation

    output.format_of(options)
    wanted = Adaptation(classes, in_channels, image_size, vocab_size)
    if wanted == Adaptation():
        raise RequestError(
            "adapt takes at least one of --classes, --in-channels, --image-size and --vocab-size",
            "modelcli adapt --classes 10 -m resnet18",
        )
    with recipe_locked(edit.model, source.recipe, tell_waiting), progress.of_bytes(options) as report:
        target = find_target(edit.model, source.overrides(), source.recipe)
        adapted = carry_out(AdaptRequest(target, wanted, write_request(edit, edit.out)), report)
    show_outcome(adapted.target, adapted.result, edit, options, with_edits=True)


def commands() -> list[Command]:
    return [Command("adapt", adapt, "Edit", exit_codes(0, 2, 3, 4, 5), shares_work=writes_file)]
