"""A reader with an error of the program, for processes that import it."""

from typing import Any

from train.data.records.reader import Reader


class ReaderWithATypo(Reader):
    """Fails on record 1 as code does that has a wrong key."""

    def open(self, source: int, record: int) -> Any:
        """As `Reader.open`."""
        if record == 1:
            return {"right": 1}["wrong"]
        return super().open(source, record)
