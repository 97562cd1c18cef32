"""Makes itda.npz with the released ITDA code (davidkaczer/itda, commit 1f5de82: the history of pleask/itda).

    python itda.py <folder of a checkout>

``train.py`` imports libraries for language models that are not needed for the dictionary; empty modules stand in for
them. Batches have the shape (sequences, tokens, d) there.
"""

import sys
import types
from pathlib import Path

import numpy as np
import torch

for name in ("socketio", "socketio.exceptions", "yaml", "datasets", "wandb", "transformers", "tqdm"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["socketio.exceptions"].ConnectionError = ConnectionError
sys.modules["datasets"].load_dataset = sys.modules["tqdm"].tqdm = None
sys.modules["transformers"].AutoTokenizer = sys.modules["transformers"].AutoModelForCausalLM = None
sys.path.insert(0, sys.argv[1])
from train import ITDATrainer  # noqa: E402

STEPS, SEQUENCES, TOKENS, D, K, TAU, MOST = 6, 2, 16, 8, 3, 0.02, 20
generator = torch.Generator().manual_seed(0)
mix = torch.randn(20, D, generator=generator)
rows = torch.relu(torch.randn(STEPS, SEQUENCES, TOKENS, 20, generator=generator)) @ mix
# the first batch has eight distinct rows: which of equally frequent rows come first depends on their sorting there
rows[0] = rows[0].reshape(-1, D)[torch.randint(8, (SEQUENCES, TOKENS), generator=generator)]
out = {"rows": rows.reshape(-1, D).numpy(), "k": K, "tau": TAU, "batch": SEQUENCES * TOKENS}
for name, most in (("free", 0), ("cropped", MOST)):
    trainer = ITDATrainer(
        layer=0, steps=STEPS, activation_dim=D, k=K, loss_threshold=TAU, lm_name="", dataset="", seq_len=TOKENS,
        batch_size=SEQUENCES, device="cpu", max_dict_size=most,
    )  # fmt: skip
    errors = [trainer.update(step, rows[step]) for step in range(STEPS)]
    model = trainer.itda
    out |= {
        f"{name}_atoms": model.atoms.numpy(),
        f"{name}_rows": (model.atom_indices[:, 0] * TOKENS + model.atom_indices[:, 1]).numpy(),
        f"{name}_errors": np.array(errors, np.float32),
        f"{name}_codes": model.encode(rows.reshape(-1, D)).numpy(),
    }
    print(name, model.atoms.shape, errors)
np.savez(Path(__file__).with_suffix(".npz"), **out)
