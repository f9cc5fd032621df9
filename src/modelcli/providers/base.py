"""What a provider declares: all that has to be known of a library's models before torch, or that library, is imported.

A provider turns references of one kind into models. This is its torch-free half; the other one, which builds, is a
`modelcli.live.providers.LiveProvider` that `live` names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from modelcli import installed
from modelcli.language.quoting import quoted

if TYPE_CHECKING:
    from pathlib import Path

    from modelcli.language.expressions import Call
    from modelcli.providers.published import PublishedModel


class Provider:
    """A library of models. Subclass it, set the attributes, and override what the library has.

    Everything here is asked for a look at a file, for completion or for `list`: it reads no more than text on the disk,
    and imports neither torch nor the library.
    """

    #: What messages call it: the name of its library.
    name: ClassVar[str]
    #: Where its other half is: `package.module:Class`, a subclass of `modelcli.live.providers.LiveProvider`.
    live: ClassVar[str]
    #: What stands before the colon of its references, `timm` in `timm:resnet50`. None for those that come with
    #: modelcli and whose models go by their bare names.
    prefix: ClassVar[str | None] = None
    #: Whether its models have names, which `names` gives: `list` shows them, and `identify` compares with them.
    has_names: ClassVar[bool] = False
    #: Whether to build all its models takes minutes. Then `list` shows them for a pattern with the prefix alone and
    #: counts their parameters itself, and `identify` builds those that `names_like` gives.
    has_many_models: ClassVar[bool] = False
    #: What its models are called in `--help`, with an example: `a timm model (timm:resnet50)`.
    title: ClassVar[str] = ""
    #: The names under which its libraries are installed. Their versions decide what is built: they belong to the key of
    #: every blueprint that is kept and of what `list` keeps, and those of the built-in providers to `--version`.
    packages: ClassVar[tuple[str, ...]] = ()
    #: The extra of modelcli that installs its libraries: `timm` in `pip install modelcli[timm]`; None where none does.
    extra: ClassVar[str | None] = None
    #: The package whose module classes an expression may name by their bare names, as messages call it: `torch.nn`.
    classes_from: ClassVar[str | None] = None
    #: Names that a script gets from what this provider lets it import: nothing of the user's can be called so there.
    script_names: ClassVar[frozenset[str]] = frozenset()

    def names(self) -> Sequence[str]:
        """The names of its models without the prefix, read off the installed library; for `list` and completion."""
        return ()

    def full_names(self) -> Sequence[str]:
        """The names that completion offers: those of `names`, and longer ones that mean a model too."""
        return self.names()

    def at_hand(self) -> tuple[Sequence[PublishedModel], str]:
        """The models on this machine of a provider that cannot list all of its own: see `has_names`.

        `list` shows them for a pattern with the prefix. Neither torch nor a network is used.

        Returns:
            The models, each by its name behind the prefix; and the place where they are, for messages, which is empty
            for a provider without such a place.

        Raises RequestError where a library is not installed that knows them.
        """
        return (), ""

    def names_like(self, keys: Collection[str]) -> Sequence[Sequence[str]]:
        """Those of `names` that a checkpoint with these keys may belong to, in groups, the likeliest group first.

        Asked where `has_many_models` is set: `identify` builds a group at a time, and stops behind the first with a
        model that fits.
        """
        return [self.names()]

    def weights_names(self) -> Sequence[str]:
        """Every name that pretrained weights of its models have, as `--weights` takes it."""
        return ()

    def weights_names_of(self, name: str) -> Sequence[str]:
        """The names of the pretrained weights of one model, for completion; nothing is imported or built for it."""
        return self.weights_names()

    def class_names(self) -> Sequence[str]:
        """The module classes that expressions may name by their bare names."""
        return ()

    def bare_words(self) -> Sequence[str]:
        """The words that mean a model of its own also where a file is called so; asked without a prefix alone."""
        return self.names()

    def owns(self, package: str) -> bool:
        """Whether module classes in a package are the library's own, by the dotted name of the package.

        These may be named in expressions and in records without `--trust`: to look one up runs the library alone.
        """
        return False

    def is_known_code(self, name: str) -> bool:
        """Whether a record in a file may name this model without `--trust`, by the name before its arguments.

        Only where to build it runs the code of the installed library and nothing that a file brings. Asked only of a
        provider with a prefix; what stands in the arguments is asked for by itself.
        """
        return False

    def recognises(self, folder: Path) -> bool:
        """Whether a folder that is given as a model, by its path alone, is one of its models, and no plain checkpoint.

        Then the path is the model's name behind the prefix: `runs/bert` means `PREFIX:runs/bert`. It is asked for every
        folder that is looked at, and does no more than look for a file by its name.
        """
        return False

    def compare_with_tensors(
        self, folder: Path, tensors: Mapping[str, tuple[Sequence[int] | None, str]]
    ) -> tuple[Sequence[str], Sequence[str]]:
        """Compare the configuration of a folder, and the other texts in it, with the tensors of its weights.

        Args:
            folder: one that the provider recognises.
            tensors: the shape and the dtype of each tensor, by its key in the files.

        Returns:
            The names of the files that were compared, and the faults, a sentence each.

        Raises FileFormatError where the configuration cannot be read.
        """
        return (), ()

    def own_folder(self, name: str, folder: Path) -> Path | None:
        """The folder with the files of a model that is an architecture and a checkpoint in one, or None.

        Its weights are the model's default values.

        Args:
            name: the model, as its reference names it.
            folder: what a relative path in the name is seen from.
        """
        return None

    def excess(self, call: Call, folder: Path, modules: int) -> str | None:
        """Why a model is far too large to build, as far as its files tell; None where nothing says so.

        It is asked before torch and the library are imported, which takes seconds.

        Args:
            call: the model with its arguments, as its reference names it.
            folder: what a relative path in the name is seen from.
            modules: how many modules a model may have.

        Returns:
            The end of a sentence that begins with the configuration of the model.
        """
        return None

    def is_remote(self, name: str) -> bool:
        """Whether a name means a model that has to be fetched, and never a folder that is called so."""
        return False

    def pinned(self, name: str, folder: Path, *, requests: bool = True) -> str:
        """The name of the same model that nobody can change while a command works on it, such as one with its commit.

        The texts that describe the model are fetched for it, its values are not.

        Args:
            name: the model, as its reference names it.
            folder: what a relative path in the name is seen from.
            requests: whether the network may be used; without it a name of which nothing is known stays as it is.

        Raises RequestError, SystemFailureError where there is no such model, or none that can be reached.
        """
        return name

    def downloaded(self, name: str, folder: Path) -> str:
        """The same, once the values of the model are on this machine as well: then it has an `own_folder`."""
        return self.pinned(name, folder)

    def is_partial(self, name: str, folder: Path) -> bool:
        """Whether the `own_folder` of a model that has to be fetched is without its weights as yet."""
        return False

    def chosen_weights(self, folder: Path) -> Path:
        """What the library loads of a folder that holds weights: a file in it where it prefers one, else the folder."""
        return folder

    def identity(self, name: str, folder: Path) -> str | None:
        """What decides a model whose name is that of files: while it stays the same, a look at it need not build it.

        None for a model that its name alone decides, or whose files are not to be known: see `is_known_code`.

        Args:
            name: the model, as its reference names it.
            folder: what a relative path in the name is seen from.
        """
        return None

    @property
    def is_installed(self) -> bool:
        """Whether all its libraries are installed."""
        return not self.missing_packages

    @property
    def missing_packages(self) -> list[str]:
        """Those of its libraries that are not installed."""
        return [package for package in self.packages if installed.version(package) is None]

    @property
    def install_command(self) -> str:
        """What installs the libraries that are missing, for a hint."""
        wanted = [f"modelcli[{self.extra}]"] if self.extra is not None else self.missing_packages
        return f"pip install {' '.join(map(quoted, wanted))}"

    def parse(self, text: str) -> Call:
        """What stands after the prefix: `NAME` or `NAME(arguments)`; the name is everything before the parenthesis.

        Raises RequestError for text that names no model, and for arguments that are no literals.
        """
        from modelcli.language import expressions

        return expressions.parse_named(text)
