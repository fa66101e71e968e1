"""A page in the browser to try a trained generator: classes or prompts in, images out.

grpo demo runs/NAME
grpo demo FOLDER --demo.port 8000        (a folder that grpo share wrote)
grpo demo runs/NAME --text.path flan-t5-xl

The page is served at this machine's own address unless --demo.host says otherwise, and asks nothing of any other host.
It needs gradio: pip install 'autoregressive-grpo[demo]'.
"""

if __name__ == "__main__":  # before the imports, so that --help does without torch
    from grpo.__main__ import run_job

    run_job("demo")

import errno
import os
import socket
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from PIL import Image

from grpo.config import DemoRecipe, UserError, import_extra, load_recipe, of_run
from grpo.sharing import ImageGenerator

MOST_IMAGES = 64
SMALLEST_SIDE = 192  # pixels of an image on the page, at least; smaller ones are enlarged
FONTS = ["system-ui", "sans-serif"]  # the reader's own: the page fetches none
STYLE = """
.gradio-container {max-width: 1200px !important; margin: 0 auto !important}
.grid-wrap img {image-rendering: pixelated}
@media (max-width: 640px) {.grid-container {grid-template-columns: repeat(2, minmax(0, 1fr)) !important}}
"""


def main(arguments: Sequence[str]) -> None:
    """Read the recipe, load the generator, serve the page until the process is stopped."""
    recipe = load_recipe(DemoRecipe, of_run(DemoRecipe, arguments), needs_files=True)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when the library is imported: it would call home
    gradio = import_extra("gradio", extra="demo", wanted_by="grpo demo")
    host, port = recipe.demo.host, free_port(recipe.demo.host, recipe.demo.port)
    generator = ImageGenerator.from_recipe(recipe)
    blocks = page(gradio, generator, title=recipe.model.name)
    try:
        blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            footer_links=[],
            theme=gradio.themes.Default(font=FONTS, font_mono=["monospace"]),
            css=STYLE,
        )
    except OSError as error:
        raise UserError(f"demo.host = {host}, demo.port = {port}: cannot be served ({error}); try another") from error
    print(f"The page is at http://{host}:{port} until Ctrl-C", flush=True)
    blocks.block_thread()


def free_port(host: str, wanted: int = 0) -> int:
    """The port that is wanted, or any (0), which nobody uses at the moment. Raises a UserError: there is none."""
    try:
        with socket.create_server((host, wanted)) as server:
            return server.getsockname()[1]
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            told = f"demo.port = {wanted}: {os.strerror(error.errno)}; --demo.port 0 takes a free one"
            raise UserError(told) from error
        raise UserError(f"demo.host = {host}: {error.strerror}; 127.0.0.1 is this machine") from error


def page(gradio: ModuleType, generator: ImageGenerator, *, title: str) -> Any:
    """The page: what is asked for on the left, images on the right; on a phone one below the other."""
    sampling = generator.sampling
    with gradio.Blocks(title=f"grpo: {title}", analytics_enabled=False) as blocks:
        gradio.Markdown(f"## {title}")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                if generator.reads_texts:
                    asked = gradio.Textbox(label="Prompts, one a line", lines=3)
                else:
                    names = [
                        (name if name == str(number) else f"{number} {name}", number)
                        for number, name in enumerate(generator.class_names)
                    ]
                    first = [number for _, number in names[:4]]
                    asked = gradio.Dropdown(names, value=first, multiselect=True, label="Classes, drawn in turn")
                count = gradio.Slider(1, MOST_IMAGES, value=8, step=1, label="Images")
                seed = gradio.Number(value=0, precision=0, minimum=0, label="Seed")
                guidance = gradio.Slider(1, 10, value=sampling.cfg_scale, step=0.05, label="Guidance (1 is off)")
                temperature = gradio.Slider(0.05, 2, value=sampling.temperature, step=0.05, label="Temperature")
                with gradio.Accordion("Truncation", open=False):
                    top_k = gradio.Number(value=sampling.top_k, precision=0, minimum=0, label="Top-k (0 is off)")
                    top_p = gradio.Slider(0.01, 1, value=sampling.top_p, step=0.01, label="Top-p (1 is off)")
                button = gradio.Button("Draw", variant="primary")
            with gradio.Column(scale=2, min_width=320):
                images = gradio.Gallery(
                    show_label=False, columns=4, height="auto", object_fit="contain", format="png", fit_columns=False
                )

        def draw(words: Any, count: int, seed: int, guidance: float, temperature: float, k: int, p: float) -> Any:
            asked = (words or "").splitlines() if generator.reads_texts else words or []
            try:
                return drawn(
                    generator, [word for word in asked if word != ""], num_images=int(count), seed=int(seed or 0),
                    cfg_scale=guidance, temperature=temperature, top_k=int(k or 0), top_p=p,
                )  # fmt: skip
            except UserError as error:
                raise gradio.Error(str(error), print_exception=False) from error

        inputs = [asked, count, seed, guidance, temperature, top_k, top_p]
        button.click(draw, inputs, images, api_name="draw")
    return blocks


def drawn(
    generator: ImageGenerator, asked: Sequence[Any], *, num_images: int, **settings: Any
) -> list[tuple[Image.Image, str]]:
    """Images, large enough to be seen, with what was asked for."""
    kind = "prompts" if generator.reads_texts else "classes"
    images = generator(**{kind: asked}, num_images=min(num_images, MOST_IMAGES), **settings)
    names = asked if generator.reads_texts else [generator.class_names[number] for number in asked]
    return [(enlarged(image), names[number % len(names)]) for number, image in enumerate(images)]


def enlarged(image: Image.Image) -> Image.Image:
    """A small image with its pixels as squares."""
    factor = max(1, -(-SMALLEST_SIDE // image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
