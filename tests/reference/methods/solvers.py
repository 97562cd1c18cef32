"""What released pursuits and the released dark-matter regressions give on small inputs.

    python solvers.py --overcomplete FOLDER --dictionary-learning FOLDER --dark-matter FOLDER

Folders hold the packages ``overcomplete`` 0.3.0 (PyPI: MpSAE, OMPSAE), ``dictionary_learning`` 0.1.0 (PyPI:
``grad_pursuit``) and the scripts of github.com/JoshEngels/SAE-Dark-Matter (ff5df15), of which only the functions are
run, not what the scripts do with their authors' files. Writes ``solvers.npz``: rows and atoms that we drew and what
came out, float32. torch 2.15, CPU, one thread. The regressions shuffle the rows, in the order of ``torch.randperm``
after the seed.
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

import numpy as np
import torch
from _peers import module

N, D, M, K = 24, 16, 48, 6


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pursuits(overcomplete: str, dictionary_learning: str) -> dict[str, torch.Tensor]:
    x, atoms = drawn(N, D, seed=0), torch.nn.functional.normalize(drawn(M, D, seed=1), dim=1)
    found = {"x": x, "atoms": atoms}
    module("overcomplete.sae", overcomplete, stand_ins=("cv2", "timm", "torchvision"))
    from overcomplete.sae.mp_sae import MpSAE
    from overcomplete.sae.omp_sae import OMPSAE

    given = {"dictionary_params": {"initializer": atoms}}
    with torch.no_grad():
        for k in (1, 3, K):
            found[f"mp/{k}"] = MpSAE(D, M, k=k, **given).eval().encode(x)[1]
        # its 10 projected-gradient steps do not reach the least squares; run to the end
        found[f"omp/{K}"] = OMPSAE(D, M, k=K, max_iter=20_000, **given).eval().encode(x)[1]
        found[f"omp10/{K}"] = OMPSAE(D, M, k=K, **given).eval().encode(x)[1]
    gradient = module("dictionary_learning.grad_pursuit", dictionary_learning)
    for k in (1, 3, K):
        found[f"gradient/{k}"] = gradient.grad_pursuit(x, atoms.T, k)
    return found


def functions(file: Path, given: dict) -> dict:
    """Functions of a script, without running the rest of it."""
    tree = ast.parse(file.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    exec(compile(tree, str(file), "exec"), given)
    return given


def dark_matter(folder: str) -> dict[str, torch.Tensor]:
    import einops

    peer = functions(Path(folder, "encoder_pursuit.py"), {"torch": torch, "einops": einops})
    x, atoms = drawn(N, D, seed=0), torch.nn.functional.normalize(drawn(M, D, seed=1), dim=1)
    targets = torch.arange(N) % 7
    pursued = {"rows/targets": targets, "rows/codes": peer["grad_pursuit"](x, atoms, targets)}
    peer = functions(Path(folder, "utils.py"), {"torch": torch, "get_sae_info": None, "SAEInfoObject": None})
    x = drawn(400, 8, seed=2) @ drawn(8, 8, seed=3) + 1
    x_hat = 0.7 * x + 0.2 * torch.relu(x @ drawn(8, 8, seed=4)) + 0.3 * drawn(400, 8, seed=5)
    found = pursued | {"dm/x": x, "dm/x_hat": x_hat}
    for name, target in (("vec", x - x_hat), ("norm", (x - x_hat).norm(dim=-1) ** 2)):
        torch.manual_seed(6)
        _, r2, solution = peer["run_lstsq"](
            x, target, lstsq_token_threshold=200, eval_token_threshold=400, device="cpu"
        )
        found |= {f"dm/r2_{name}": torch.tensor(r2), f"dm/solution_{name}": solution}
    torch.manual_seed(6)
    order = torch.randperm(400)
    found["dm/held"] = torch.zeros(400)
    found["dm/held"][order[200:]] = 1
    found["dm/fvu"] = peer["fraction_variance_unexplained"](x, x_hat)
    found["dm/fvu_nonlinear"] = peer["fraction_variance_unexplained"](x, x_hat + x @ found["dm/solution_vec"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("overcomplete", "dictionary-learning", "dark-matter"):
        parser.add_argument(f"--{name}", required=True)
    folders = parser.parse_args()
    torch.set_num_threads(1)
    found = pursuits(folders.overcomplete, folders.dictionary_learning) | dark_matter(folders.dark_matter)
    arrays = {name: np.asarray(value, np.float32) for name, value in found.items()}
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **arrays)


if __name__ == "__main__":
    main()
