"""The one exception that a user of the tool is meant to read."""


class UserError(Exception):
    """Something in the user's hands is wrong: a field, a file, a machine.

    Rooms and stages raise it; `train.main` prints it as one sentence and exits with
    code 2. A traceback is for our own mistakes only.

    Args:
      name: the field (`config.data.per_class`) or path that is wrong.
      wanted: what would have been right.
      got: what was found instead.
      fix: the way out, as an imperative sentence.
    """

    def __init__(self, name: str, *, wanted: str, got: str, fix: str):
        super().__init__(f"{name}: wanted {wanted}, got {got}. {fix}")
        self.name = name


def require(condition: bool, name: str, *, wanted: str, got: object, fix: str) -> None:
    """Raises a `UserError` unless `condition` holds."""
    if not condition:
        raise UserError(name, wanted=wanted, got=f"{got}", fix=fix)
