"""What on-policy methods share: one Lightning epoch is one iteration.

At the start of an epoch a module samples responses, scores them and fills its experience; the epoch's batches are then
shuffled minibatches of that experience, and everything else (optimizer steps, clipping, accumulation, schedules,
checkpoints, strategies) is Lightning's own. `PromptDataModule` hands over its prompts through `experience_dataloader`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..functional import kl_k1
from .checks import require, require_divides
from .clock import PhaseClock
from .experience import Experience, ExperienceDataset, TokenStatistics, experience_loader, of_all_ranks
from .host_memory import let_go_of_files
from .reporting import figures_of_all, report, seen
from .rollout import Rollout
from .rollout_module import Reward, RolloutModule
from .samples import Samples, repeated

SLOWEST = dict(sync_dist=True, reduce_fx="max")
SAME_EVERYWHERE = dict(sync_dist=True)


class OnPolicyModule(RolloutModule):
    """Base of PPO and its relatives: an iteration's rollout becomes the epoch's experience.

    Args:
        model: the starting policy, usually the SFT model's folder.
        reward: what to maximise; see `RolloutModule`.
        normalize_rewards: bring rewards to one scale, by their means and standard deviations so far, before they are
            weighted.
        rollout_batch_size: responses per iteration on each process.
        group_size: G, responses per prompt; divides `rollout_batch_size`.
        minibatch_size: sequences per minibatch on each process; divides those that an iteration learns from, which for
            most methods is `rollout_batch_size`.
        num_passes: passes over each iteration's experience, K in the PPO paper. Usual: 1 to 4.
        normalize_scores: subtract the mean and divide by the standard deviation of all scores of the run so far.
        frozen_in_files: on a CPU under Linux, let the pages of frozen weights that lie in their files leave the process
            when they were used; the kernel brings them again; see `host_memory.py`.
        **kwargs: see `RolloutModule` and `TextModule`.
    """

    experience_type: type[NamedTuple] = Experience
    rows_together = 1  # rows of the experience that minibatches do not part: 2 for pairs
    shuffles_groups = False  # whether optimizer steps are of whole groups, where their number of rows allows it

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward: Reward | None = None,
        *,
        normalize_rewards: bool = False,
        rollout_batch_size: int = 64,
        group_size: int = 1,
        minibatch_size: int = 16,
        num_passes: int = 4,
        normalize_scores: bool = False,
        frozen_in_files: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, reward, **kwargs)
        require("rollout_batch_size", rollout_batch_size >= 1, "at least 1", rollout_batch_size)
        require("num_passes", num_passes >= 1, "at least 1", num_passes)
        require_divides("group_size", group_size, "rollout_batch_size", rollout_batch_size)
        require_divides("minibatch_size", minibatch_size, self.learned_from, self.learned_rows)
        if minibatch_size % self.rows_together:
            raise ValueError(f"`minibatch_size` must be a multiple of {self.rows_together}, but got {minibatch_size}.")
        self.rewards.normalize = normalize_rewards
        self.samples: dict[str, list] = {}
        """The last rollout as columns: prompt, response, reward, kl, length, ended, reward/<name>."""
        self.per_token: dict[str, Tensor] = {}
        """Its tokens, (B, T) each: token_ids, mask, logprob, kl, entropy, and of some methods value and advantage."""
        self.clock = PhaseClock()
        self.progress = {"episodes": 0, "tokens": 0}
        """Responses and response tokens of all ranks so far."""
        self._sampled = {"episodes": 0, "tokens": 0}  # on this rank in this iteration
        self.score_moments = [0.0, 0.0, 0.0]  # count, sum, sum of squares of all scores so far
        self._experience: ExperienceDataset | None = None
        self._resumed: NamedTuple | None = None  # of a checkpoint from within an iteration
        self._prompts: Any = None

    learned_from = "rollout_batch_size"  # how messages call the next

    @property
    def learned_rows(self) -> int:
        """Sequences on each process that an iteration learns from."""
        return self.hparams.rollout_batch_size

    # --- building -------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check what can be checked before a model is loaded."""
        super().setup(stage)
        hparams, accumulate = self.hparams, self.trainer.accumulate_grad_batches
        minibatches = self.learned_rows // hparams.minibatch_size
        if stage == "fit" and minibatches % accumulate:
            raise ValueError(
                f"`accumulate_grad_batches` must divide the minibatches of one pass: {self.learned_from} / "
                f"minibatch_size = {self.learned_rows} / {hparams.minibatch_size} = {minibatches}, and "
                f"{minibatches} / {accumulate} = {minibatches / accumulate:g}."
            )

    def experience_dataloader(self, prompts: Any) -> DataLoader:
        """Take the stream of prompts, give the loader over the experience. `PromptDataModule` calls this."""
        h = self.hparams
        self._prompts = prompts
        ranks = self.trainer.world_size, self.global_rank
        rows = self.learned_rows * self.trainer.world_size
        self._experience = self._experience or ExperienceDataset(rows, self.rows_together)
        in_step = h.minibatch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches
        groups_of = h.group_size if self.shuffles_groups and in_step % h.group_size == 0 else 1
        return experience_loader(self._experience, h.minibatch_size, h.num_passes, self.seed, *ranks, groups_of)

    # --- one iteration --------------------------------------------------------------------------------------------

    @contextmanager
    def rollout_phase(self) -> Iterator[None]:
        """Precision as in a training step, no gradient (inference mode's tensors could not enter autograd later)."""
        self.clock.restart()
        self.clock.enter("rollout")
        with self.trainer.precision_plugin.forward_context(), torch.no_grad(), self.rollout_weights():
            yield
        torch.clear_autocast_cache()  # it may hold weights that were cast without gradient
        self.let_go_of_frozen_weights()
        self.clock.enter("update")

    def let_go_of_frozen_weights(self) -> None:
        """They have been used; what lies in its file need not be in this process for now."""
        if self.hparams.frozen_in_files and self.device.type == "cpu":
            let_go_of_files()

    def sample_and_score(self, again: int = 0) -> Samples:
        """Responses to the next prompts, G to each, and their rewards.

        Args:
            again: how many times in this iteration it was done before, for other noise.
        """
        h = self.hparams
        prompts = repeated(self._prompts.take(h.rollout_batch_size // h.group_size), h.group_size)
        prompts = self.trainer.strategy.batch_to_device(prompts)
        stream = [self.current_epoch, again] if again else [self.current_epoch]
        self.clock.enter("rollout")
        rollout = self.roll_out(prompts, self.own_rows(), *stream)
        self.clock.enter("scoring")
        self._sampled["episodes"] += len(prompts["prompts"])
        self._sampled["tokens"] += int(rollout.response_mask.sum())
        samples = self.score(rollout, prompts)
        self.let_go_of_frozen_weights()  # those of the reward model; the reference is next
        return samples

    def own_rows(self) -> range:
        """Numbers of this rank's responses among those of all ranks in an iteration."""
        size = self.hparams.rollout_batch_size
        return range(self.global_rank * size, (self.global_rank + 1) * size)

    def shaped_scores(self, scores: Tensor, rollout: Rollout) -> Tensor:
        """Scores (B,) after normalisation, clipping and the penalties for length and missing EOS, in this order."""
        if self.hparams.normalize_scores:
            new = torch.stack([torch.ones_like(scores).sum(), scores.sum(), scores.square().sum()]).double()
            self.score_moments = [
                a + b for a, b in zip(self.score_moments, self.sum_over_ranks(new).tolist(), strict=True)
            ]
            count, total, squares = self.score_moments
            variance = max(squares / count - (total / count) ** 2, 0.0)
            scores = (scores - total / count) / (variance**0.5 + 1e-8)
        return super().shaped_scores(scores, rollout)

    def fill(self, experience: NamedTuple) -> None:
        """Give the epoch's batches their content: the experience of all ranks."""
        self._experience.experience = of_all_ranks(experience)

    def observe(self, samples: Samples, statistics: TokenStatistics, **per_token: Tensor) -> None:
        """Log figures of the iteration's samples, and keep them for callbacks to look at.

        Args:
            samples: the rollout and its scores.
            statistics: of its tokens.
            per_token: what else the method knows of them, (B, T) each.
        """
        rollout = samples.rollout
        self.samples = report(self, "rollout", samples, statistics)
        for name, value in figures_of_all([seen(samples)]).items():
            self.log_mean(f"rollout/{name}", torch.tensor([value], device=self.device), batch_size=1)
        columns = {"token_ids": rollout.response_ids, "mask": rollout.response_mask, "logprob": statistics.logprobs}
        columns |= {"kl": kl_k1(statistics.logprobs, statistics.ref_logprobs), "entropy": statistics.entropy}
        self.per_token = {name: values.cpu() for name, values in (columns | per_token).items()}
        sampled = self.sum_over_ranks(torch.tensor(list(self._sampled.values()), device=self.device)).tolist()
        for name, count in zip(self._sampled, sampled, strict=True):
            self.progress[name] += count
            self._sampled[name] = 0

    # --- what is seen ---------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """An iteration that a stopped run began goes on with its experience, and is timed from here."""
        super().on_train_start()
        self._experience.experience, self._resumed = self._resumed, None
        self.clock.restart()
        self.clock.enter("update")

    def on_train_batch_end(self, outputs: Any, batch: NamedTuple, batch_idx: int) -> None:
        """The update ends with the last batch; validation may follow before the epoch ends."""
        self.clock.mark()

    def on_train_epoch_end(self) -> None:
        """Time and throughput of the iteration, validation left out, and how far the run is."""
        tokens = float(sum(self.samples.get("length", [])))  # none on other ranks that resumed within the iteration
        self.clock.stop()
        seconds = sum(self.clock.seconds.values())
        for phase in ("rollout", "scoring", "update"):
            self.log(f"time/{phase}", self.clock.seconds[phase], **SLOWEST)
        self.log("time/iteration", seconds, **SLOWEST)
        progress = {"iteration": self.current_epoch + 1, **self.progress, "optimizer_steps": self.trainer.global_step}
        for name, value in progress.items():
            self.log(f"progress/{name}", float(value), **SAME_EVERYWHERE)
        if seconds > 0:  # else a resumed run found nothing left to do in this iteration
            self.log("throughput/tokens_per_second", tokens / seconds, sync_dist=True, reduce_fx="sum")

    # --- checkpoints and export -----------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The score moments go along; within an iteration its experience, too."""
        super().on_save_checkpoint(checkpoint)
        moments = {"score_moments": self.score_moments, "rewards": self.rewards.state_dict()}
        checkpoint["on_policy"] = moments | {"progress": self.progress}
        if self.is_within_epoch():
            experience = [field.cpu() for field in self._experience.experience]
            checkpoint["on_policy"] |= {"experience": experience, "samples": self.samples}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The score moments and an iteration's experience come back."""
        super().on_load_checkpoint(checkpoint)
        self.score_moments, self.progress = (checkpoint["on_policy"][name] for name in ("score_moments", "progress"))
        self.rewards.load_state_dict(checkpoint["on_policy"]["rewards"])
        if fields := checkpoint["on_policy"].get("experience"):
            self._resumed = self.experience_type(*(field.to(self.device) for field in fields))
            self.samples = checkpoint["on_policy"]["samples"] if self.global_rank == 0 else {}
