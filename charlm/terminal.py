"""Output to the terminal: by the main process only, in lines as wide as the terminal."""

import os
import sys
import textwrap


def is_main_process() -> bool:
    """Whether this is the only process of a launch or the first; known before torch is imported."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def fitted(text: str) -> str:
    """`text` with lines that are too wide for the terminal broken at spaces; as it is if stderr is no terminal."""
    try:
        width = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, AttributeError):  # no terminal, or not even a file
        return text
    if not width:  # nobody has told it
        return text
    return "\n".join(
        "\n".join(textwrap.wrap(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))
        for line in text.split("\n")
    )
