"""Serves the page to this computer alone."""

import os
from pathlib import Path
from typing import Any

from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor
from pointalign.page.intake import MAX_MEGABYTES, Item

VISITORS = 32  # whose objects and conversations are remembered
WAITING = 16  # requests that may wait; the next one is told that the page is busy


def serve(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    examples: list[Item],
    name: str,
    folder: Path,
    port: int | None = None,
    wait: bool = True,
) -> Any:
    """Start the page on 127.0.0.1 and return gradio's Blocks; with `wait` not before Ctrl-C.

    Args:
        folder: for uploads and thumbnails; whoever made it empties it.
        port: by default the first free one from 7860 on.

    Raises: OSError: the port is taken.
    """
    # read by gradio: no statistics are sent, uploads lie in one folder, and this computer is reached without a proxy
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder)}
    for variable in ("NO_PROXY", "no_proxy"):
        os.environ[variable] = ",".join(filter(None, [os.environ.get(variable), "127.0.0.1", "localhost"]))
    import gradio as gr

    from pointalign.page.layout import CSS, Page

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none from the network
    blocks = Page(model, processor, examples, name).blocks()
    blocks.queue(max_size=WAITING, default_concurrency_limit=2)
    blocks.launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        max_file_size=MAX_MEGABYTES << 20,
        state_session_capacity=VISITORS,
        theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", **fonts),
        css_paths=CSS,
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
        # no second look whether the page answers: it gives a busy computer 3 seconds, then asks for a public tunnel
        _frontend=False,
    )
    print(f"the page is open: {blocks.local_url}  (Ctrl-C ends it)", flush=True)
    if wait:
        blocks.block_thread()
    return blocks
