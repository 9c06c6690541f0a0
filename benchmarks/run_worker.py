"""One contender of `run_speed.py`: loads a model, then runs the jobs from standard input.

Each input line is a JSON list ``[batch, prompt, tokens]``; each output line is a JSON object with
the steps' milliseconds, wall-clock and CPU time, and the tokens. It runs in the contender's
environment, so it imports only what the contender needs.

    python benchmarks/run_worker.py CONTENDER FOLDER THREADS
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def cpu_seconds() -> float:
    """The CPU time of all threads of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Clock:
    """A streamer of transformers that records when each token arrives, at almost no cost."""

    def __init__(self) -> None:
        self.ticks: list[tuple[float, float]] = []

    def put(self, tokens: Any = None) -> None:
        """Record the time, except for the prompt."""
        if tokens is None or tokens.ndim < 2:
            self.ticks.append((time.perf_counter(), cpu_seconds()))

    def end(self) -> None:
        """Do nothing."""

    def steps(self) -> dict[str, list[float]]:
        """Milliseconds of the decode steps."""
        pairs = list(zip(self.ticks, self.ticks[1:], strict=False))
        return {
            "wall": [1e3 * (b[0] - a[0]) for a, b in pairs],
            "cpu": [1e3 * (b[1] - a[1]) for a, b in pairs],
        }


def make_ids(batch: int, prompt: int) -> Any:
    """The same token ids for every contender."""
    import numpy as np

    return np.random.default_rng(0).integers(0, 30000, (batch, prompt))


class Transformers:
    """PyTorch through transformers, with its default attention or with ``eager``."""

    def __init__(self, folder: Path, threads: int, attention: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation=attention
        ).eval()

    def run(self, batch: int, prompt: int, tokens: int) -> dict[str, Any]:
        """Decode greedily."""
        import torch

        ids = torch.from_numpy(make_ids(batch, prompt))
        clock = Clock()
        found = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
        return {**clock.steps(), "tokens": found[:, prompt:].tolist()}


class Optimum(Transformers):
    """optimum-onnx: its export, its session, transformers' generation loop."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime
        from optimum.onnxruntime import ORTModelForCausalLM

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        made = folder.with_name(f"{folder.name}-optimum")
        if not made.exists():
            ORTModelForCausalLM.from_pretrained(folder, export=True).save_pretrained(made)
        self.model = ORTModelForCausalLM.from_pretrained(made, session_options=options)


class GenAi:
    """onnxruntime-genai: its builder's graph in float32 (or int4), its own loop."""

    def __init__(self, folder: Path, threads: int, precision: str) -> None:
        import onnxruntime_genai

        self.genai = onnxruntime_genai
        made = folder.with_name(f"{folder.name}-genai-{precision}")
        if not made.exists():
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
            command += ["-i", str(folder), "-o", str(made), "-p", precision, "-e", "cpu"]
            command += ["-c", f"{made}-cache"]
            subprocess.run(command, check=True, stdout=sys.stderr)
        path = made / "genai_config.json"
        config = json.loads(path.read_text())
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        path.write_text(json.dumps(config))
        self.model = onnxruntime_genai.Model(str(made))

    def run(self, batch: int, prompt: int, tokens: int) -> dict[str, Any]:
        """Decode greedily."""
        parameters = self.genai.GeneratorParams(self.model)
        parameters.set_search_options(
            max_length=prompt + tokens,
            min_length=prompt + tokens,
            do_sample=False,
            batch_size=batch,
        )
        generator = self.genai.Generator(self.model, parameters)
        generator.append_tokens(make_ids(batch, prompt).astype("int32"))
        clock = Clock()
        for _ in range(tokens):
            generator.generate_next_token()
            clock.put()
        new = [
            [int(token) for token in generator.get_sequence(row)[prompt:]] for row in range(batch)
        ]
        return {**clock.steps(), "tokens": new}


class Proxy:
    """qeff-proxy: a split proxy on one of its backends."""

    def __init__(self, folder: Path, threads: int, backend: str, **options: Any) -> None:
        import torch
        from qeff_proxy.backends.compile_export import compile_export, open_sessions
        from qeff_proxy.compile_options import CompileOptions
        from qeff_proxy.export.export_model import export_model
        from qeff_proxy.load.load_model import load_config, load_model
        from qeff_proxy.plugins.manager import Plugins

        torch.set_num_threads(threads)
        loaded = load_model(str(folder))
        hooks = Plugins.discover().hooks_for(loaded.model_type)
        export = export_model(loaded, hooks, output=folder.with_name(f"{folder.name}-export"))
        chosen = CompileOptions(num_cores=threads, backend=options)
        self.compiled = compile_export(export, backend, chosen)
        start = time.perf_counter()
        compile_export(export, backend, chosen)
        self.again = time.perf_counter() - start
        self.config = load_config(export.processor_folder)
        self._opened = open_sessions(self.compiled, hooks)
        self.sessions = self._opened.__enter__()

    def run(self, batch: int, prompt: int, tokens: int) -> dict[str, Any]:
        """Decode greedily."""
        import torch
        from qeff_proxy.flows.flow import Job, load_flow

        clock = Clock()
        export = self.compiled.export
        job = Job(
            export=export,
            sessions=self.sessions,
            options=self.compiled.options,
            config=self.config,
            tensors={"input_ids": torch.from_numpy(make_ids(batch, prompt))},
            folder=export.processor_folder,
            settings={
                "max_new_tokens": tokens,
                "do_sample": False,
                "streamer": clock,
            },
        )
        ids = load_flow(export.flow).run(job)["generated_ids"]
        return {**clock.steps(), "tokens": ids.tolist(), "compile_again_s": self.again}


class Encoder:
    """Encodes texts: PyTorch, or qeff-proxy on one of its backends."""

    def __init__(self, folder: Path, threads: int, backend: str | None) -> None:
        import torch

        torch.set_num_threads(threads)
        self.proxy = Proxy(folder, threads, backend) if backend is not None else None
        if backend is None:
            from transformers import AutoModel

            self.model = AutoModel.from_pretrained(folder).eval()

    def run(self, batch: int, prompt: int, runs: int) -> dict[str, Any]:
        """Encode ``batch`` texts of ``prompt`` tokens, ``runs`` times."""
        import torch

        ids = torch.from_numpy(make_ids(batch, prompt))
        mask = torch.ones_like(ids)
        clock = Clock()
        clock.put()
        for _ in range(runs):
            if self.proxy is None:
                with torch.no_grad():
                    states = self.model(input_ids=ids, attention_mask=mask)[0]
            else:
                states = self._run_parts(ids.numpy())
            clock.put()
        return {**clock.steps(), "tokens": [float(states[0, 0, 0])]}

    def _run_parts(self, ids: Any) -> Any:
        import numpy as np
        from qeff_proxy.flows.attention_masks import build_mask

        assert self.proxy is not None
        known: dict[str, Any] = {"input_ids": ids, "token_type_ids": np.zeros_like(ids)}
        known["position_ids"] = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
        for part in self.proxy.compiled.export.parts:
            for mask in part.masks:
                ones = np.ones_like(ids)
                known[mask.name] = build_mask(mask, ones, ids.shape[1], np.dtype("float32"))
            feeds = {spec.name: known[spec.name] for spec in part.inputs}
            known.update(self.proxy.sessions[part.name].run(feeds))
        return known["last_hidden_state"]


class Roofline:
    """Reads as many bytes as a step's weights have: a matrix times a vector in PyTorch."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        config = json.loads((folder / "config.json").read_text())
        if not config.get("tie_word_embeddings", True):  # rows are looked up, not read
            size -= 4 * config["vocab_size"] * config["hidden_size"]
        self.matrix = torch.rand(size // 4 // 1024, 1024)
        self.vector = torch.rand(1024)

    def run(self, _batch: int, _prompt: int, tokens: int) -> dict[str, Any]:
        """Read all of it, once for each token."""
        clock = Clock()
        for _ in range(tokens):
            _ = self.matrix @ self.vector
            clock.put()
        return {**clock.steps(), "tokens": [], "bytes": self.matrix.numel() * 4}


CONTENDERS: dict[str, Any] = {
    "roofline": Roofline,
    "transformers": lambda folder, threads: Transformers(folder, threads, "sdpa"),
    "transformers-eager": lambda folder, threads: Transformers(folder, threads, "eager"),
    "optimum-onnx": Optimum,
    "genai": lambda folder, threads: GenAi(folder, threads, "fp32"),
    "genai-int4": lambda folder, threads: GenAi(folder, threads, "int4"),
    "qeff-proxy": lambda folder, threads: Proxy(folder, threads, "onnxruntime"),
    "qeff-proxy-int8": lambda f, threads: Proxy(f, threads, "onnxruntime", weights="int8"),
    "qeff-proxy-int4": lambda f, threads: Proxy(f, threads, "onnxruntime", weights="int4"),
    "qeff-proxy-int4-head": lambda f, threads: Proxy(
        f, threads, "onnxruntime", weights="int4", head_weights="int4"
    ),
    "qeff-proxy-openvino": lambda folder, threads: Proxy(folder, threads, "openvino"),
    "encoder-transformers": lambda folder, threads: Encoder(folder, threads, None),
    "encoder-onnxruntime": lambda folder, threads: Encoder(folder, threads, "onnxruntime"),
    "encoder-openvino": lambda folder, threads: Encoder(folder, threads, "openvino"),
}


def main() -> None:
    """Load the contender, and run the jobs from standard input."""
    name, folder, threads = sys.argv[1:]
    out, sys.stdout = sys.stdout, sys.stderr  # keep libraries' output out of the answers
    contender = CONTENDERS[name](Path(folder), int(threads))
    out.write(json.dumps({"ready": name}) + "\n")
    out.flush()
    for line in sys.stdin:
        out.write(json.dumps(contender.run(*json.loads(line))) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
