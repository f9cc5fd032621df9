"""Groups of options that commands share. A parameter of a group's type gives a command all options of the group."""

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import typer
from typer._click.types import StringParamType  # typer's own click: nothing else of it leaves a type out of the help
from typer.models import ArgumentInfo

from modelcli.cli import completing, parallel

if TYPE_CHECKING:
    from modelcli.commands.assertions import Assertions
    from modelcli.language.references import Source


EXIT_CODES = {
    0: "done",
    1: "the answer is no",
    2: "the request is wrong",
    3: "refused as unsafe",
    4: "the file is corrupt or of no known kind",
    5: "the system failed",
    130: "interrupted",
}
#: The exit code if another signal ended the program: 143 for SIGTERM, 129 for SIGHUP.
ENDED = "128 + N: ended by signal N"


def exit_codes(*codes: int, no: str | None = None) -> str:
    """Return the last lines of a command's help. `no` is the meaning of exit code 1, if the command uses it."""
    meanings = EXIT_CODES | ({} if no is None else {1: no})
    return "Exit codes: " + "; ".join(f"{code} {meanings[code]}" for code in (*codes, 130)) + f"; {ENDED}."


class _Given(NamedTuple):
    """An option in a group: its default value, and Typer's description of it."""

    default: Any
    info: Any


def _option(*names: str, help: str | None = None, default: Any = None, **settings: Any) -> Any:  # noqa: A002
    return _Given(default, typer.Option(*names, help=help, **settings))


class OptionGroup:
    """Options that several commands share. A subclass declares them like the fields of a dataclass.

    It is not a dataclass because Python needs 2 ms to create one with twenty fields, in every run of every command.
    """

    #: The type and the declaration of each option, by name, those of base classes first.
    options: ClassVar[Mapping[str, tuple[Any, _Given]]] = {}

    def __init_subclass__(cls) -> None:
        found = dict(cls.options)
        for name, annotation in inspect.get_annotations(cls).items():
            given = cls.__dict__.get(name)
            if isinstance(given, _Given):
                found[name] = annotation, given
                setattr(cls, name, given.default)
        cls.options = found

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"the options of a command cannot be changed: {name}")


def check_seed(seed: int | None) -> None:
    """Raise RequestError for a seed that torch does not accept."""
    from modelcli.errors import RequestError

    if seed is not None and not 0 <= seed < 2**63:
        raise RequestError(f"--seed must be a whole number from 0 to 2^63 - 1, not {seed}")


class OutputOptions(OptionGroup):
    """Options for the output."""

    format: str | None = _option(
        "-f",
        "--format",
        help="table, json, csv or markdown. \\[default: table]",
        metavar="FORMAT",
        rich_help_panel="Output",
        autocompletion=completing.one_of("table", "json", "csv", "markdown"),
    )
    json: bool = _option("--json", help="Short for -f json.", default=False, rich_help_panel="Output")
    quiet: bool = _option("-q", "--quiet", help="No notes, no progress bar.", default=False, rich_help_panel="Output")
    debug: bool = _option("--debug", help="Show tracebacks.", default=False, rich_help_panel="Output")


class ModelOptions(OptionGroup):
    """Options for the architecture and values of one model, or of the two that `diff` compares."""

    weights: str | None = _option(
        "--weights",
        help="none, DEFAULT, the name of pretrained weights, or a file.",
        rich_help_panel="Model",
        autocompletion=completing.weights,
        metavar="WEIGHTS",
    )
    arch: str | None = _option(
        "--arch",
        help="The architecture of a checkpoint that records none.",
        rich_help_panel="Model",
        autocompletion=completing.models,
        metavar="REFERENCE",
    )
    seed: int | None = _option(
        "--seed",
        help="The seed of random values. \\[default: 0]",
        metavar="N",
        rich_help_panel="Model",
    )
    tensors_only: bool = _option(
        "--tensors-only",
        help="Use only the tensors of a file that contains other objects, and drop the rest.",
        default=False,
        rich_help_panel="Model",
    )
    bare_keys: bool = _option(
        "--bare-keys",
        help="Ignore the file's record: edit its keys, and write tensors alone (and which are frozen, if an edit says "
        "so). --arch is then for --check same alone.",
        default=False,
        rich_help_panel="Model",
    )
    trust: bool = _option(
        "--trust",
        help="Allow the file's record to run the Python code that it names.",
        default=False,
        rich_help_panel="Model",
    )


class SourceOptions(ModelOptions):
    """Options for one model, besides its reference."""

    key: str | None = _option(
        "--key",
        help="The state dict in a training checkpoint.",
        rich_help_panel="Model",
        autocompletion=completing.keys,
        metavar="NAME",
    )
    input_size: list[str] | None = _option(
        "--input-size",
        help="Shape of an input, batch included: 1,3,224,224. Repeat for more inputs.",
        metavar="SIZES",
        rich_help_panel="Model",
    )
    input_dtype: list[str] | None = _option(
        "--input-dtype",
        help="Dtype of the inputs. \\[default: the model's own]",
        rich_help_panel="Model",
        autocompletion=completing.dtypes,
        metavar="DTYPE",
    )
    inputs: list[str] | None = _option(
        "--input",
        help="NAME=SHAPE\\[:DTYPE], or NAME==VALUE: input_ids=1,128:int64, batch.image=1,3,8,8, x=scalar, steps==5; "
        "none if forward takes no input. Repeat for more inputs.",
        metavar="INPUT",
        rich_help_panel="Model",
    )
    recipe: Path | None = _option(
        "--recipe",
        help="The recipe. \\[default: $MODELCLI_RECIPE, or modelcli.toml]",
        rich_help_panel="Model",
        metavar="FILE",
    )

    def overrides(self) -> dict[str, Any]:
        """The fields of a `Source` that were given. Raises RequestError for an input that cannot be read."""
        from modelcli.language.references import parse_input_size

        check_seed(self.seed)
        dtypes: tuple[str, ...] = ()
        if self.inputs or self.input_dtype:
            from modelcli.language import input_texts

            input_texts.parse_all(self.inputs or ())
            dtypes = tuple(map(input_texts.dtype_of_input, self.input_dtype or ()))
        return {
            "weights": self.weights,
            "arch": self.arch,
            "key": self.key,
            "seed": self.seed,
            "input_size": tuple(map(parse_input_size, self.input_size or ())),
            "input_dtype": dtypes,
            "inputs": tuple(self.inputs or ()),
            "trust": self.trust,
            "tensors_only": self.tensors_only,
            "bare_keys": self.bare_keys,
        }


class DiffOptions(ModelOptions):
    """Options for the two models that `diff` compares, besides their references."""

    key: list[str] | None = _option(
        "--key",
        help="The state dict in a training checkpoint. Repeat for different ones in A and B.",
        metavar="NAME",
        rich_help_panel="Model",
        autocompletion=completing.keys,
    )

    def sources(self, a: str, b: str) -> "tuple[Source, Source]":
        """Return the two models. Raises RequestError for more than two keys."""
        from modelcli.errors import RequestError
        from modelcli.language.references import Source

        keys: list[str | None] = [*self.key] if self.key else [None]
        if len(keys) > 2:
            raise RequestError(
                f"{len(keys)} keys for two models", "pass --key once for both, or twice: for A, then for B"
            )
        check_seed(self.seed)
        rest = {name: getattr(self, name) for name in ("weights", "arch", "seed", "tensors_only", "bare_keys", "trust")}
        return Source(a, key=keys[0], **rest), Source(b, key=keys[-1], **rest)


class AssertOptions(OptionGroup):
    """The assertions of `check`."""

    max_params: str | None = _option(
        "--max-params", help="The model has at most N parameters: 60M.", metavar="N", rich_help_panel="Assertions"
    )
    max_bytes: str | None = _option(
        "--max-bytes",
        help="Parameters and buffers need at most SIZE bytes: 250MB.",
        metavar="SIZE",
        rich_help_panel="Assertions",
    )
    frozen: list[str] | None = _option(
        "--frozen",
        help="Every parameter that SELECTOR picks is frozen.",
        metavar="SELECTOR",
        rich_help_panel="Assertions",
        autocompletion=completing.targets,
    )
    trainable: list[str] | None = _option(
        "--trainable",
        help="Every parameter that SELECTOR picks is trainable.",
        metavar="SELECTOR",
        rich_help_panel="Assertions",
        autocompletion=completing.targets,
    )
    has: list[str] | None = _option(
        "--has",
        help="SELECTOR matches something: 'classifier.6:Linear'.",
        metavar="SELECTOR",
        rich_help_panel="Assertions",
        autocompletion=completing.targets,
    )
    absent: list[str] | None = _option(
        "--absent",
        help="SELECTOR matches nothing.",
        metavar="SELECTOR",
        rich_help_panel="Assertions",
        autocompletion=completing.targets,
    )
    dtype: list[str] | None = _option(
        "--dtype",
        help="Every floating-point tensor has this dtype. Repeat to allow more dtypes.",
        metavar="DTYPE",
        rich_help_panel="Assertions",
        autocompletion=completing.dtypes,
    )
    finite: bool = _option("--finite", help="No value is NaN or infinite.", default=False, rich_help_panel="Assertions")
    safe: bool = _option(
        "--safe",
        help="The file contains no objects that could run code.",
        default=False,
        rich_help_panel="Assertions",
    )
    output_shape: list[str] | None = _option(
        "--output-shape",
        help="The output of the forward pass is a tensor of this shape: 1,10.",
        metavar="SIZES",
        rich_help_panel="Assertions",
    )
    same_as: list[str] | None = _option(
        "--same-as",
        help="All tensors equal those of this model in name, shape, dtype and values.",
        metavar="REFERENCE",
        rich_help_panel="Assertions",
        autocompletion=completing.models,
    )
    same_output_as: list[str] | None = _option(
        "--same-output-as",
        help="The outputs equal those of this model on the same random input, on the CPU. The row names the first "
        "module that diverges.",
        metavar="REFERENCE",
        rich_help_panel="Assertions",
        autocompletion=completing.models,
    )
    rtol: float | None = _option(
        "--rtol",
        help="With --same-output-as: ignore differences up to X times the value in REFERENCE. \\[default: 1e-5 of the "
        "largest value for float32, 1e-3 for float16, 1.6e-2 for bfloat16]",
        metavar="X",
        rich_help_panel="Assertions",
    )
    atol: float | None = _option(
        "--atol", help="With --same-output-as: ignore differences up to X.", metavar="X", rich_help_panel="Assertions"
    )
    content_hash: str | None = _option(
        "--hash",
        help="The hash that modelcli hash prints for the model is this one.",
        metavar="sha256:HEX",
        rich_help_panel="Assertions",
    )
    complete: bool = _option(
        "--complete",
        help="The index, the shards, their headers and the configuration of a folder agree.",
        default=False,
        rich_help_panel="Assertions",
    )
    arch_check: bool = _option(
        "--arch-check",
        help="The configuration of a folder builds a model with exactly its tensors. This imports its library.",
        default=False,
        rich_help_panel="Assertions",
    )
    without: list[str] | None = _option(
        "--except",
        help="Tensors that --same-as ignores.",
        metavar="SELECTOR",
        rich_help_panel="Assertions",
        autocompletion=completing.targets,
    )

    def assertions(self) -> "Assertions":
        """Return the assertions. Raises RequestError for an invalid option, or for assertions that conflict."""
        from modelcli.commands import content_hash
        from modelcli.commands.assertions import Assertions
        from modelcli.language.references import parse_bytes, parse_count, parse_input_size
        from modelcli.model.dtypes import dtype_called

        found = Assertions(
            max_params=None if self.max_params is None else parse_count(self.max_params),
            max_bytes=None if self.max_bytes is None else parse_bytes(self.max_bytes),
            frozen=tuple(self.frozen or ()),
            trainable=tuple(self.trainable or ()),
            has=tuple(self.has or ()),
            absent=tuple(self.absent or ()),
            dtypes=tuple(map(dtype_called, self.dtype or ())),
            finite=self.finite,
            safe=self.safe,
            output_shapes=tuple(map(parse_input_size, self.output_shape or ())),
            same_output_as=tuple(self.same_output_as or ()),
            rtol=self.rtol,
            atol=self.atol,
            same_as=tuple(self.same_as or ()),
            content_hash=None if self.content_hash is None else content_hash.parse(self.content_hash),
            complete=self.complete,
            arch_check=self.arch_check,
            without=tuple(self.without or ()),
        )
        found.require_sense()
        return found


class LookOptions(OptionGroup):
    """Options of the commands that only show something."""

    option_model: str | None = _option(
        "-m",
        "--model",
        help="The same as the MODEL argument.",
        rich_help_panel="Model",
        autocompletion=completing.models,
        metavar="MODEL",
    )
    no_cache: bool = _option(
        "--no-cache",
        help="Build the model without reading or writing the cache.",
        default=False,
        rich_help_panel="Model",
    )


#: The checks before writing.
CHECKS = ("meta", "run", "same", "none")


class SaveOptions(OptionGroup):
    """Options for the model to write, and for how to write it."""

    model: str | None = _option(
        "-m",
        "--model",
        help="The model. \\[default: the working recipe]",
        rich_help_panel="Model",
        autocompletion=completing.models,
        metavar="MODEL",
    )
    force: bool = _option("--force", help="Replace an existing file.", default=False, rich_help_panel="Result")
    dry_run: bool = _option("--dry-run", help="Write no file.", default=False, rich_help_panel="Result")
    check: str = _option(
        "--check",
        help="Before writing, run the model on the meta device (meta) or on the CPU with values (run), demand the "
        "outputs of the unedited model (same), or skip it (none). same allows differences of 1e-5 of the largest "
        "value (float16 1e-3, bfloat16 1.6e-2, float64 1e-7).",
        default="meta",
        metavar="HOW",
        rich_help_panel="Result",
        autocompletion=completing.one_of(*CHECKS),
    )
    bare: bool = _option(
        "--bare",
        help="Drop everything in a training checkpoint except the state dict.",
        default=False,
        rich_help_panel="Result",
    )
    also_ema: bool = _option(
        "--also-ema",
        help="Edit other state dicts of the same model in a training checkpoint too, such as an EMA.",
        default=False,
        rich_help_panel="Result",
    )
    compact: bool = _option(
        "--compact",
        help="Write only the elements of each tensor, not the rest of a storage that it is a view of.",
        default=False,
        rich_help_panel="Result",
    )
    max_shard_size: str | None = _option(
        "--max-shard-size",
        help="The maximum size of a file in a folder; a larger tensor has a file of its own. \\[default: 5GB]",
        metavar="SIZE",
        rich_help_panel="Result",
    )
    format_out: str | None = _option(
        "--format-out",
        help="How a folder/ is written: safetensors, or dcp for torch.distributed.checkpoint. \\[default: safetensors]",
        metavar="FORMAT",
        rich_help_panel="Result",
        autocompletion=completing.one_of("safetensors", "dcp"),
    )
    no_fsync: bool = _option(
        "--no-fsync",
        help="Do not wait until the data is on the disk: for scratch files.",
        default=False,
        rich_help_panel="Result",
    )
    verify: bool = _option(
        "--verify",
        help="Compare the files read with checksums beside them (SHA256SUMS, NAME.sha256, the Hub's cache, zip CRCs), "
        "and read every byte back.",
        default=False,
        rich_help_panel="Result",
    )
    resume: bool = _option(
        "--resume",
        help="Go on where an interrupted run of the same command stopped, and keep complete files of this one if it is "
        "interrupted: for folders.",
        default=False,
        rich_help_panel="Result",
    )


class EditOptions(SaveOptions):
    """Options for the model to edit, and for where to write the result."""

    out: str | None = _option(
        "-o",
        "--out",
        help="The file to write: {suffixes}, or a folder/.",
        rich_help_panel="Result",
        metavar="OUT",
    )


class WorkOptions(OptionGroup):
    """The option of commands that several processes can share."""

    jobs: int | None = _option(
        "--jobs",
        help="Share the work out to N processes on this machine. torchrun starts processes on several machines.",
        metavar="N",
        rich_help_panel="Processes",
        min=1,
        max=parallel.MOST_JOBS,
    )


class UnheededOptions(OptionGroup):
    """Options of `apply` that `script` accepts and ignores, so that both take the same words."""

    force: bool = _option("--force", default=False, hidden=True)
    dry_run: bool = _option("--dry-run", default=False, hidden=True)
    check: str = _option("--check", default="meta", hidden=True)
    also_ema: bool = _option("--also-ema", default=False, hidden=True)
    max_shard_size: str | None = _option("--max-shard-size", hidden=True)
    format_out: str | None = _option("--format-out", hidden=True)
    no_fsync: bool = _option("--no-fsync", default=False, hidden=True)
    verify: bool = _option("--verify", default=False, hidden=True)
    jobs: int | None = _option("--jobs", hidden=True)
    resume: bool = _option("--resume", default=False, hidden=True)


def names_of(*groups: Any) -> set[str]:
    """Return the long names of all options in some groups."""
    options = [given.info for group in groups for _, given in group.options.values()]
    # Typer stores the first name as the default until the option is part of a signature.
    return {name for option in options for name in (option.default, *option.param_decls) if name.startswith("--")}


def _parameters_of(group: type[OptionGroup]) -> list[inspect.Parameter]:
    return [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=given.default, annotation=Annotated[annotation, given.info]
        )
        for name, (annotation, given) in group.options.items()
    ]


class _Word(StringParamType):
    """A text parameter whose type the help leaves out, because `<str>` does not help users."""

    def get_metavar(self, *_args: Any, **_given: Any) -> str:
        return ""


def _named_in_capitals(parameter: inspect.Parameter) -> None:
    """Make the help name an argument in capitals if it has no other name there, and leave its type out."""
    for info in getattr(parameter.annotation, "__metadata__", ()):
        if isinstance(info, ArgumentInfo):
            info.metavar = info.metavar or parameter.name.upper()
            info.click_type = info.click_type or (None if info.min is not None else _Word())


#: Whether several ranks share the work of a command, or a function of its arguments and options that says it.
SharesWork = bool | Callable[[Mapping[str, Any]], bool]


def writes_file(given: Mapping[str, Any]) -> bool:
    """Whether an edit is about to write a checkpoint, by its options: only that is shared out."""
    return given["out"] is not None and not given["dry_run"]


def expanded(function: Callable[..., Any], *, shares_work: SharesWork = False) -> Callable[..., Any]:
    """Return the function with each parameter of an option group replaced by its options, as Typer needs it.

    A function that `shares_work` gets `WorkOptions` too, and runs on all ranks; any other runs on rank 0 alone. Where
    nothing is shared out with the options given, `--jobs` starts no process.
    """
    signature = inspect.signature(function, eval_str=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        kind = parameter.annotation
        if not (isinstance(kind, type) and issubclass(kind, OptionGroup)):
            _named_in_capitals(parameter)
            parameters.append(parameter)
            continue
        groups[parameter.name] = kind
        parameters += _parameters_of(kind)
    if shares_work:
        parameters += _parameters_of(WorkOptions)

    @functools.wraps(function)
    def call(*args: Any, **given: Any) -> Any:
        if shares_work:
            jobs = given.pop("jobs")
            is_shared = shares_work(given) if callable(shares_work) else True
            with parallel.workers(jobs if is_shared else None):
                return carry_out(*args, **given)
        parallel.only_rank_0()
        return carry_out(*args, **given)

    def carry_out(*args: Any, **given: Any) -> Any:
        made = {name: kind(**{key: given.pop(key) for key in kind.options}) for name, kind in groups.items()}
        return function(*args, **given, **made)

    ordered = sorted(parameters, key=lambda parameter: parameter.kind)
    call.__signature__ = signature.replace(parameters=ordered, return_annotation=int | None)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    del call.__wrapped__
    return call
