"""The command ``fastvae explore``: a server of one page, which no one but this machine reaches and which reaches no one."""

import errno
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

from fastvae._extras import extra
from fastvae.training import checkpoints
from fastvae.training.data_module import AutoencoderData
from fastvae.training.errors import TrainingError
from fastvae.training.explorer.latent_space import LatentSpace, check_model
from fastvae.training.module import labels_of

# Test images that say which dimensions are active: the standard error of a variance is then below a twentieth of it.
SAMPLES = 1000
FIRST_PORT, PORTS = 7860, 100
# A photograph; in bytes.
MAX_FILE_SIZE = 32 * 2**20
# Everything that the page loads comes from the server: a browser refuses what would come from elsewhere.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; form-action 'self'; frame-ancestors 'none'"
)


def explore(checkpoint: Path, data: AutoencoderData | None = None, host: str = "127.0.0.1", port: int | None = None) -> None:
    """Serves a page on which a model's latent space is looked around in: sliders, samples, reconstructions, interpolations.

    Args:
        checkpoint: a file that fastvae fit wrote.
        data: the data set, whose test part says which latent dimensions are active; that of the training by default.
        host: address to listen on. Any but the default lets other machines in, without a password.
        port: port to listen on; by default the first that is free from 7860 on.
    """
    lit = checkpoints.load(checkpoint)
    check_model(lit)
    port = free_port(host, port)
    with tempfile.TemporaryDirectory(prefix="fastvae-explore-") as folder:
        gradio_page = _gradio_without_network(Path(folder))
        space = _space(lit, data)
        recipe: Any = lit.network.recipe
        serve(gradio_page.build(space, f"{recipe.name}, trained on {lit.data_name}"), gradio_page.look(), host, port)


def _space(lit: Any, data: AutoencoderData | None) -> LatentSpace:
    """The latent space, as the first test samples fill it."""
    data = checkpoints.build_data(lit.data_name, lit.data_options) if data is None else data
    batch = data.samples("test", SAMPLES)
    checkpoints.check_shape(lit, data, batch["x"])
    return LatentSpace(lit, batch["x"], *labels_of(batch, lit.network))


def _gradio_without_network(folder: Path) -> Any:
    """The module of the page, with Gradio told to report nothing, to look for no newer version, and to keep its files in ``folder``."""
    # Gradio reads them when it is imported.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_TEMP_DIR": str(folder)}
    with extra("explore"):
        import gradio  # noqa: F401

        from fastvae.training.explorer import page
    return page


def free_port(host: str, port: int | None) -> int:
    """``port``, or the first port from 7860 on that nobody listens on.

    Raises:
        TrainingError: for a port that is in use, or an address that is not one of this machine.
    """
    wanted = range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else (port,)
    for candidate in wanted:
        try:
            with socket.create_server((host, candidate)):
                return candidate
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise TrainingError(f"host, port: got {host}, {candidate}, which cannot be listened on: {error.strerror}") from error
    raise TrainingError(
        f"port: got {port}, which is in use" if port is not None else f"port: all from {wanted[0]} to {wanted[-1]} are in use"
    )


def serve(page: Any, look: dict[str, Any], host: str, port: int) -> None:
    """Serves a page until Ctrl-C; ``look`` are the options of Gradio's ``launch`` for it."""
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        quiet=True,
        footer_links=[],
        **look,
        max_file_size=MAX_FILE_SIZE,
        app_kwargs={"middleware": [(LocalContent, (), {})]},
        prevent_thread_lock=True,
    )
    print(f"http://{host}:{port}", flush=True)
    page.block_thread()


class LocalContent:
    """Middleware that sends the content security policy with each answer.

    Args:
        app: the application behind it.
    """

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", CONTENT_SECURITY_POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)
