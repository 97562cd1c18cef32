"""Makes snmf.npz with the released semi-NMF code (ordavid-s/snmf-mlp-decomposition, commit ab58c78).

    python snmf.py <folder of a checkout>

Its ``NMFSemiNMF`` draws its start itself, so ``torch.rand`` and ``torch.randn`` are repeated from the same seed. Rows
are columns there. It appends a line to ``training_summary.log`` in the working folder.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, sys.argv[1])
from factorization.seminmf import NMFSemiNMF, init_svd

N, D, K, STEPS = 40, 12, 4, 25
generator = torch.Generator().manual_seed(0)
rows = torch.randn(N, D, generator=generator)
out = {"rows": rows.numpy(), "n_steps": STEPS}
for name, keep in (("dense", 1.0), ("sparse", 0.3)):
    torch.manual_seed(1)
    model = NMFSemiNMF(K, sparsity=keep).fit(rows.T, max_iter=STEPS, patience=1000, verbose=False)
    out |= {
        f"{name}_keep": keep,
        f"{name}_atoms": model.F_.detach().numpy(),
        f"{name}_codes": model.G_.detach().numpy(),
    }
torch.manual_seed(1)
out["codes_start"] = torch.rand(N, K).clamp_min(1e-6).numpy()
out["atoms_start"] = torch.randn(D, K).numpy()
atoms, codes = init_svd(rows.T, K)
out |= {"svd_atoms": atoms.numpy(), "svd_codes": codes.numpy()}
np.savez(Path(__file__).with_suffix(".npz"), **out)
