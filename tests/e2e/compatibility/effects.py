"""What a row looks for in an answer. Each takes what came, and `ask`: the row's endpoint without its field, and with others."""

from collections.abc import Callable


def holds(check: Callable[[dict], object]):
    """The answer's body fits."""
    def seen(got, ask):
        assert check(got.json), got.body
    return seen


def texts(text: Callable):
    """`says`: the text fits. `the_same_as`, `changes_with`: it beside that of a request with other fields in place of the row's."""
    def says(check):
        def seen(got, ask):
            assert check(text(got)), got.body
        return seen

    def the_same_as(**more):
        def seen(got, ask):
            assert text(got) == text(ask(**more)), got.body
        return seen

    def changes_with(**more):
        def seen(got, ask):
            assert text(got) != text(ask(**more)), got.body
        return seen

    return says, the_same_as, changes_with


def differs(count: Callable):
    """A count is another than without the field: the model was shown something else."""
    def seen(got, ask):
        assert count(got) != count(ask()), got.body
    return seen


def streamed(got, ask):
    """Events came."""
    assert got.chunks, got.body
