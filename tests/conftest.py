"""Small models, a home for their exports, and installed packages; for all tests."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from transformers import PreTrainedModel

    ModelFactory = Callable[..., PreTrainedModel]

# How long an example takes says something of the machine's load, and nothing of the program.
settings.register_profile("any load", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any load")

VOCABULARY = 131  # a number that is no other size in these models

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--virtual-time-budget=4000",
]  # fmt: skip

# Put before the page's own script: what goes wrong in it is written into the page.
CATCH = """<script>
window.faults = [];
addEventListener("error", (e) => faults.push(String(e.message || e)));
document.addEventListener("securitypolicyviolation", (e) => faults.push(e.violatedDirective));
</script>"""

PROBE = """<script>
addEventListener("load", () => {
  let out;
  try { out = (() => { SCRIPT })(); } catch (e) { faults.push(String(e)); }
  const pre = document.createElement("pre");
  pre.id = "probe";
  pre.textContent = JSON.stringify({ out, faults });
  document.body.append(pre);
});
</script>"""

#: Whatever a config calls its sizes.
_SMALL: dict[str, Any] = {
    # Depth comes from the argument `layers`.
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "word_embed_proj_dim": 48,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "n_inner": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 0,
    "num_layers": 0,
    "n_layer": 0,
    "n_layers": 0,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "max_position_embeddings": 160,
    "n_positions": 160,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Configs whose class takes no such argument although it has an attribute of that name.
_NOT_FOR = {"falcon": {"head_dim"}}


def small_model(model_type: str, seed: int = 0, layers: int = 2, **changes: Any) -> PreTrainedModel:
    """A causal LM from a shrunk config, with random norms and biases: nothing is zero or one."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(seed)
    default = CONFIG_MAPPING[model_type]()
    settings = {
        name: value
        for name, value in _SMALL.items()
        if hasattr(default, name)
        and name not in _NOT_FOR.get(model_type, ())
        and not (name == "sliding_window" and default.sliding_window is None)
    }
    layer_types = vars(default).get("layer_types")  # some derive them from other settings
    for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
        if name in settings:
            settings[name] = layers
    if layer_types:  # the kinds in turn
        kinds = list(dict.fromkeys(layer_types))
        settings["layer_types"] = (kinds * layers)[:layers]
    config = CONFIG_MAPPING[model_type](**{**settings, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(noise * 0.1)
            else:
                parameter.copy_(noise * 0.15)
    model.generation_config.eos_token_id = None  # generate as many tokens as were asked for
    return model


@pytest.fixture(scope="session")
def make_model() -> ModelFactory:
    """`small_model` as a fixture."""
    return small_model


@pytest.fixture(scope="session")
def saved_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a small GPT-2, without a tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint") / "small-gpt2"
    small_model("gpt2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demo_export(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Path) -> Path:
    """A split export of the trained checkpoint; tests must not change it."""
    from qeff_proxy.export.export_model import export_model
    from qeff_proxy.load.load_model import load_model
    from qeff_proxy.plugins.manager import Plugins

    loaded = load_model(str(demo_checkpoint))
    hooks = Plugins.discover().hooks_for("gpt2")
    return export_model(loaded, hooks, output=tmp_path_factory.mktemp("demo") / "export").folder


@pytest.fixture(scope="session")
def eager(demo_checkpoint: Path) -> Any:
    """The trained checkpoint in PyTorch; tests must not change it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo_checkpoint).eval()


@pytest.fixture(scope="session")
def tokenizer(demo_checkpoint: Path) -> Any:
    """Its tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_checkpoint)


class SitePackages:
    """A folder that Python imports from, as an installer would leave it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(
        self,
        package: str,
        families: Mapping[str, str],
        modules: Mapping[str, str] | None = None,
        version: str = "1.0",
    ) -> None:
        """Install a package whose entry points are ``families`` and that has ``modules``."""
        lines = "".join(f"{model_type} = {value}\n" for model_type, value in families.items())
        self.install_metadata(package, f"[qeff_proxy.families]\n{lines}".encode(), version)
        for name, source in (modules or {}).items():
            (self.folder / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")

    def install_metadata(self, package: str, entry_points: bytes, version: str = "1.0") -> Path:
        """Install metadata alone."""
        info = self.folder / f"{package.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        (info / "entry_points.txt").write_bytes(entry_points)
        return info


@pytest.fixture
def site_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SitePackages]:
    """A place for packages, taken off the path again together with what was imported from it."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("QEFF_PROXY_PLUGINS", raising=False)
    yield SitePackages(folder)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is not None and folder in Path(file).parents:
            del sys.modules[name]


@pytest.fixture(scope="session")
def chromium():
    found = next(
        (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))),
        None,
    )
    if found is None:
        if os.environ.get("QEFF_PROXY_TEST_WITHOUT_BROWSER") == "1":
            pytest.skip("QEFF_PROXY_TEST_WITHOUT_BROWSER=1: the report is not opened in a browser")
        pytest.fail(
            "Chromium is not installed, so the HTML report cannot be tested: install Debian's "
            "package 'chromium', or set QEFF_PROXY_TEST_WITHOUT_BROWSER=1 to leave these tests out"
        )
    return [found, *FLAGS]


@pytest.fixture
def browse(chromium, tmp_path):
    """Open a page in Chromium, run a script in it, and return what the script gives."""

    def run(page: str, script: str, *flags: str):
        code = PROBE.replace("SCRIPT", script)
        page = page.replace("<head>", "<head>" + CATCH)
        file = tmp_path / "page.html"
        file.write_text(page.replace("</body>", code + "</body>"))
        command = [*chromium, f"--user-data-dir={tmp_path / 'profile'}", *flags]
        done = subprocess.run(
            [*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=50
        )
        probe = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
        assert probe, done.stderr[-2000:]
        value = json.loads(html.unescape(probe[1]))
        assert value["faults"] == []
        return value.get("out")

    return run
