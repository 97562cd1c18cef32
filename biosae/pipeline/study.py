"""The stages of one study, from samples and embeddings to the comparison of encoders and the report."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biosae.data import Samples
from biosae.files import hash_json, read_h5ad, read_table, write_h5ad, write_json, write_table
from biosae.pipeline import see
from biosae.pipeline.config import EncoderConfig, PipelineConfig, SamplesConfig, find_input
from biosae.pipeline.inputs import (
    check_columns,
    check_encoder,
    content,
    in_split,
    is_file_name,
    load_encoder,
    read_samples,
)
from biosae.pipeline.stages import Stage
from biosae.provenance import record

N_STRATA = 3
"""Latents of a target that the table of strata takes from the pooled analysis, and from the stratified one."""


@dataclass(frozen=True)
class View:
    """One (encoder, layer) of a study; the first one is the primary view and writes to the top of the run folder."""

    encoder: EncoderConfig
    layer: str
    primary: bool

    @property
    def name(self) -> str:
        return f"{self.encoder.name}__{self.layer}"

    def place(self, file: str) -> str:
        """Where a result of this view lies, relative to the run folder."""
        return file if self.primary else f"views/{self.name}/{file}"

    @property
    def embeddings(self) -> str:
        return f"embeddings/{self.encoder.name}/{self.layer}"

    @property
    def sae(self) -> str:
        return f"sae/{self.name}"


class Study:
    """A checked configuration, bound to the folder of its file and to its run folder; makes the list of stages."""

    def __init__(self, config: PipelineConfig, *, base: Path, folder: Path):
        self.config, self.base, self.folder = config, base, folder
        for encoder in config.encoders:
            check_encoder(encoder, base=base)
        self.views = [
            View(encoder, layer, primary=(i == 0 and j == 0))
            for i, encoder in enumerate(config.encoders)
            for j, layer in enumerate(encoder.layers)
        ]

    # -- the list of stages ------------------------------------------------------------------------------------------

    def stages(self) -> list[Stage]:
        """Every stage in order. Keys chain: a stage's inputs hold the keys of the stages that it reads."""
        c = self.config
        samples = self._samples_stage("samples", c.samples, "samples.parquet")
        stages = [samples]
        second = None
        if c.transfer is not None:
            second = self._samples_stage("samples/second", c.transfer.samples, "second/samples.parquet")
            stages.append(second)
        results: list[Stage] = []
        for encoder in c.encoders:
            views = [v for v in self.views if v.encoder is encoder]
            embed = self._embed_stage(encoder, views, samples, prefix="")
            stages.append(embed)
            embed_second = None
            if second is not None:
                embed_second = self._embed_stage(encoder, views, second, prefix="second/")
                stages.append(embed_second)
            for view in views:
                made = self._view_stages(view, embed, embed_second)
                stages += made
                results += made
        compare = Stage(
            "compare",
            {"views": [v.name for v in self.views], "results": {s.name: s.key for s in results}},
            ("tables/comparison.csv",),
            self._compare,
        )
        report = Stage(
            "report",
            {"study": self._study_json(), "results": {s.name: s.key for s in [*stages, compare]}},
            ("report.html", "provenance.json"),
            self._report,
        )
        last = [see.atlas_stage(c, self.folder, report)] if c.atlas is not None else []
        return [*stages, compare, report, *last]

    def _samples_stage(self, name: str, samples: SamplesConfig, target: str) -> Stage:
        inputs: dict[str, Any] = {"config": samples.model_dump(), "random_state": self.config.random_state}
        if samples.source != "phantom":
            inputs["content"] = content(find_input(samples.table, base=self.base))
        return Stage(name, inputs, (target,), lambda: self._write_samples(samples, target))

    def _embed_stage(self, encoder: EncoderConfig, views: list[View], samples: Stage, *, prefix: str) -> Stage:
        files = [content(find_input(f, base=self.base)) for f in (encoder.source, encoder.weights) if is_file_name(f)]
        inputs = {"samples": samples.key, "encoder": encoder.model_dump(exclude={"tokens", "role"}), "files": files}
        outputs = tuple(f"{prefix}{v.embeddings}/provenance.json" for v in views)
        return Stage(
            f"{prefix}embed/{encoder.name}", inputs, outputs, lambda: self._embed(encoder, samples.outputs[0], prefix)
        )

    def _view_stages(self, view: View, embed: Stage, embed_second: Stage | None) -> list[Stage]:
        c, name = self.config, view.name
        train = Stage(
            f"train/{name}",
            {"embed": embed.key, "sae": c.sae.model_dump(), "fit_on": self._fit_on(), "random_state": c.random_state},
            (f"{view.sae}/config.json", f"{view.sae}/model.safetensors"),
            lambda: self._train(view),
        )
        tokens = {"tokens": view.encoder.tokens}
        encode = Stage(
            f"encode/{name}",
            {"train": train.key, **tokens},
            (view.place("latents.h5ad"),),
            lambda: self._encode(view, "", view.place("latents.h5ad")),
        )
        associate = Stage(
            f"associate/{name}",
            {"encode": encode.key, "associate": c.associate.model_dump(), "random_state": c.random_state},
            (view.place("associations.csv"), view.place("tables/summary.csv")),
            lambda: self._associate(view),
        )
        stages = [train, encode, associate]
        settled = {"associate": c.associate.model_dump(), "random_state": c.random_state}
        if c.replicate is not None:
            inputs = {"encode": encode.key, "replicate": c.replicate.model_dump(), **settled}
            output = (view.place("tables/replication.csv"),)
            stages.append(Stage(f"replicate/{name}", inputs, output, lambda: self._replicate(view)))
        if c.associate.strata is not None:
            inputs = {"associate": associate.key, "n": N_STRATA}
            output = (view.place("tables/within_strata.csv"),)
            stages.append(Stage(f"strata/{name}", inputs, output, lambda: self._within_strata(view)))
        if c.confounders is not None:
            inputs = {"encode": encode.key, "confounders": c.confounders.model_dump(), **settled}
            output = (view.place("tables/confounders.csv"), view.place("tables/readout.csv"))
            stages.append(Stage(f"confounders/{name}", inputs, output, lambda: self._confounders(view)))
        if c.transfer is not None and embed_second is not None:
            encode_second = Stage(
                f"second/encode/{name}",
                {"train": train.key, "embed": embed_second.key, **tokens},
                (f"second/{name}/latents.h5ad",),
                lambda: self._encode(view, "second/", f"second/{name}/latents.h5ad"),
            )
            inputs = {"encode": encode.key, "second": encode_second.key, "transfer": c.transfer.model_dump(), **settled}
            output = (view.place("tables/transfer.csv"),)
            stages += [encode_second, Stage(f"transfer/{name}", inputs, output, lambda: self._transfer(view))]
        return stages + see.view_stages(c, self.folder, view, encode, fit_on=self._fit_on())

    # -- the work ------------------------------------------------------------------------------------------------------

    def _write_samples(self, section: SamplesConfig, target: str) -> None:
        failures = (self.folder / target).parent / "failures.csv"
        c = self.config
        samples = read_samples(
            section, base=self.base, random_state=c.random_state, failures=failures, max_failures=c.max_failures
        )
        first = section is self.config.samples
        check_columns(samples, self.config.columns() if first else self._columns_of_second())
        if first:
            see.check_values(samples, self.config)
        (self.folder / target).parent.mkdir(parents=True, exist_ok=True)
        samples.save(self.folder / target)

    def _columns_of_second(self) -> dict[str, str]:
        t = self.config.transfer
        named = dict.fromkeys(t.targets.values(), "transfer.targets")
        extra = {"unit": t.unit, "strata": t.strata, "groups": t.groups}
        return named | {v: f"transfer.{k}" for k, v in extra.items() if v not in (None, "sample", "patient")}

    def _embed(self, encoder: EncoderConfig, samples: str, prefix: str) -> None:
        from biosae.embeddings.extract import embed

        embed(
            Samples.load(self.folder / samples),
            load_encoder(encoder, base=self.base),
            layer=list(encoder.layers),
            pool=encoder.pool,
            out=self.folder / prefix / "embeddings",
            batch_size=encoder.batch_size,
            max_failures=self.config.max_failures,
            failures=self.folder / prefix / "failures.csv",
        )

    def _fit_on(self) -> str | None:
        if self.config.sae.fit_on is not None:
            return self.config.sae.fit_on
        return self.config.replicate.discovery if self.config.replicate is not None else None

    def _train(self, view: View) -> None:
        from biosae.embeddings.store import Embeddings
        from biosae.sae.named import named

        c = self.config.sae
        emb = Embeddings.open(self.folder / view.embeddings)
        part = self._fit_on()
        if part is not None:
            emb = emb.select(in_split(emb.obs, part))
        seed, folder = self.config.random_state, self.folder / view.sae
        # a training that was killed goes on from its own state; one with other settings or rows has another folder
        kind = hash_json([c.model_dump(), seed, emb.fingerprint, list(emb.obs.index)])[:12]
        unfinished = folder / f"unfinished-{kind}"
        sae = named(c.architecture, n_latents=c.n_latents, k=c.k, random_state=seed, **c.options)
        if "checkpoint" in sae.names() and sae.checkpoint is None:
            sae.set_params(checkpoint=str(unfinished))
        sae.fit(emb).save(folder)
        for state in folder.glob("unfinished-*"):
            shutil.rmtree(state)

    def _encode(self, view: View, prefix: str, target: str) -> None:
        from biosae.embeddings.store import Embeddings
        from biosae.latents import encode
        from biosae.sae import load

        emb = Embeddings.open(self.folder / prefix / view.embeddings)
        adata = encode(load(self.folder / view.sae), emb, tokens=view.encoder.tokens)
        write_h5ad(self.folder / target, adata)

    def _latents(self, path: str) -> Any:
        return read_h5ad(self.folder / path)

    def _associate(self, view: View) -> None:
        from biosae.stats import associate, power, summary
        from biosae.stats.null import null_table
        from biosae.stats.permutation import watched

        c = self.config.associate
        adata = self._latents(view.place("latents.h5ad"))
        if c.on is not None:
            adata = adata[in_split(adata.obs, c.on).to_numpy()].copy()
        how = {**self._how(), "n_permutations": c.n_permutations}
        with watched() as watch:
            result = associate(adata, c.targets, **how)
        if watch.largest:
            self._write(view.place("tables/permutations.csv"), null_table(result, watch))
        if c.covariates:
            methods = {str(m) for m in result["method"]}
            same = {"method": methods.pop()} if len(methods) == 1 else {}
            before = associate(adata, c.targets, **{**how, **same, "covariates": (), "n_permutations": 0})
            self._write(view.place("tables/unadjusted.csv"), before)
        self._write(view.place("associations.csv"), result)
        self._write(view.place("tables/summary.csv"), summary(result))
        same = {name: how[name] for name in ("unit", "groups", "aggregate", "assume_independent")}
        self._write(view.place("tables/power.csv"), power(adata, c.targets, **same))
        write_json(self.folder / view.place("tables/associate.json"), result.attrs.get("biosae", {}))

    def _replicate(self, view: View) -> None:
        from biosae.stats import replicate

        c = self.config
        result = replicate(
            self._latents(view.place("latents.h5ad")),
            c.associate.targets,
            discovery=c.replicate.discovery,
            replication=c.replicate.replication,
            n_permutations=c.replicate.n_permutations,
            **{**self._how(), **c.replicate.options},
        )
        self._write(view.place("tables/replication.csv"), result)

    def _how(self) -> dict[str, Any]:
        a = self.config.associate
        names = ("unit", "method", "covariates", "strata", "controls", "groups", "assume_independent", "aggregate")
        return {**{n: getattr(a, n) for n in names}, **a.options, "random_state": self.config.random_state}

    def _within_strata(self, view: View) -> None:
        """Pooled and within strata, for the latents that either analysis would name first."""
        import pandas as pd

        from biosae.stats import ranked, within_strata

        a = self.config.associate
        adata = self._latents(view.place("latents.h5ad"))
        parts = []
        for target in a.targets:
            table = within_strata(
                adata,
                target,
                strata=a.strata,
                unit=a.unit,
                method=a.method,
                groups=a.groups,
                aggregate=a.aggregate,
                assume_independent=a.assume_independent,
            )
            first = [ranked(table[table["stratum"] == s])["latent"].head(N_STRATA) for s in ("pooled", "within")]
            parts.append(table[table["latent"].isin(pd.concat(first))])
        self._write(view.place("tables/within_strata.csv"), pd.concat(parts, ignore_index=True))

    def _confounders(self, view: View) -> None:
        from biosae.stats import confounders, readout

        c = self.config
        adata = self._latents(view.place("latents.h5ad"))
        how = {"random_state": c.random_state, "groups": c.associate.groups}
        table = confounders(
            adata,
            biology=c.confounders.biology,
            technical=c.confounders.technical,
            n_permutations=c.confounders.n_permutations,
            assume_independent=c.associate.assume_independent,
            **how,
        )
        self._write(view.place("tables/confounders.csv"), table)
        out = readout(adata, c.confounders.technical, **how)
        out.insert(0, "encoder", view.encoder.name)
        out.insert(1, "layer", view.layer)
        self._write(view.place("tables/readout.csv"), out)

    def _transfer(self, view: View) -> None:
        from biosae.stats import replicate

        t = self.config.transfer
        second = self._latents(f"second/{view.name}/latents.h5ad")
        second.obs = second.obs.assign(**{target: second.obs[column] for target, column in t.targets.items()})
        first = self._latents(view.place("latents.h5ad"))
        if self.config.replicate is not None:
            first = first[in_split(first.obs, self.config.replicate.discovery).to_numpy()].copy()
        result = replicate(
            first,
            list(t.targets),
            replication=second,
            replication_unit=t.unit,
            replication_strata=t.strata,
            replication_groups=t.groups,
            replication_assume_independent=t.assume_independent,
            n_permutations=self.config.replicate.n_permutations if self.config.replicate else 0,
            **self._how(),
        )
        result["target_second"] = result["target"].map(t.targets)
        self._write(view.place("tables/transfer.csv"), result)

    def _compare(self) -> None:
        import pandas as pd

        name = "replication" if self.config.replicate is not None else "summary"
        parts = [self._labelled(v, f"tables/{name}.csv") for v in self.views]
        self._write("tables/comparison.csv", pd.concat(parts, ignore_index=True))
        for extra in ("readout", "transfer", "retrieval"):
            tables = [
                self._labelled(v, f"tables/{extra}.csv")
                for v in self.views
                if (self.folder / v.place(f"tables/{extra}.csv")).exists()
            ]
            if tables:
                self._write(f"tables/{extra}_all.csv", pd.concat(tables, ignore_index=True))

    def _labelled(self, view: View, table: str) -> Any:
        frame = read_table(self.folder / view.place(table))
        frame = frame.drop(columns=[c for c in ("encoder", "layer", "role") if c in frame])
        frame.insert(0, "encoder", view.encoder.name)
        frame.insert(1, "layer", view.layer)
        frame.insert(2, "role", view.encoder.role)
        return frame

    def _study_json(self) -> dict[str, Any]:
        c = self.config
        return {
            "name": c.name,
            "title": c.title or c.name.replace("_", " "),
            "question": c.question,
            "random_state": c.random_state,
            "primary": {"encoder": self.views[0].encoder.name, "layer": self.views[0].layer},
            "config": c.model_dump(),
        }

    def _report(self) -> None:
        from biosae.reports import report

        write_json(self.folder / "study.json", self._study_json())
        write_json(
            self.folder / "provenance.json",
            record(config=self.config.model_dump(), config_fingerprint=self.config.fingerprint),
        )
        report(self.folder, out=self.folder / "report.html", max_latents=self.config.max_latent_cards)

    def _write(self, name: str, table: Any) -> None:
        write_table(self.folder / name, table)
