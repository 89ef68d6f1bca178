"""How the page of the web demo looks, and its one script."""

from __future__ import annotations

import gradio as gr

from geochat.data.draw import colour
from geochat.serve.web_view import COLOURS

# Gradio's default asks for the weight 600 of this font, whose file has a few letters only.
_FONT = (gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif")

THEME = gr.themes.Default(primary_hue="blue", secondary_hue="blue", neutral_hue="slate", font=_FONT).set(
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_cancel_background_fill="#b91c1c",
    button_cancel_background_fill_hover="#991b1b",
)
"""Gradio's own in a colour that no box has. Its fonts come from the server, too."""

_LAYOUT = """
:focus-visible { outline: 2px solid var(--color-accent) !important; outline-offset: 2px; }
#status, #status * { border: none !important; background: none !important; box-shadow: none !important; }
#status textarea { padding: 0 var(--spacing-sm); }
#picture img { max-height: 70vh; }
#pieces:not(:has(.highlighted)) { display: none; }
#scenes .grid-wrap { min-height: 0; max-height: none; overflow: visible; }
#scenes .grid-container { grid-template: auto / repeat(var(--grid-cols), minmax(0, 1fr)); grid-auto-rows: auto; }
#scenes .caption-label { font-size: var(--text-xs); padding: 1px 5px; }
/* One column: what is needed to ask comes before what is needed later. */
@media (max-width: 720px) {
    #page > .column { display: contents; }
    #page > .column > * { flex: 1 1 100%; order: 2; }
    #picture, #pieces, #scenes { order: 0 !important; }
    #chat, #status, #tasks, #question, #send-row { order: 1 !important; }
    #chat { height: 45vh !important; }
    #scenes .caption-label { display: none; }
}
"""


def _highlight(number: int) -> str:
    """Gradio paints a phrase with half of its colour; here it is the one of the box."""
    red, green, blue = colour(number)
    painted = f"background-color: rgb({red}, {green}, {blue}) !important"
    return f"#pieces .highlighted[style*='{red}, {green}, {blue},'] {{ {painted} }}"


CSS = _LAYOUT + "\n".join(_highlight(number) for number in range(COLOURS))

PASTE = """() => document.addEventListener("paste", (event) => {
    const picture = [...event.clipboardData.files].find((file) => file.type.startsWith("image/"));
    const place = document.querySelector("#picture .upload-container");
    if (!picture || !place) return;
    event.preventDefault();
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(picture);
    place.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
})"""
"""A picture that is pasted anywhere on the page is taken as one that is dropped on the picture's place."""
