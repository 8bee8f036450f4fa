"""TDPO with TRL. What is TRL's stays TRL's: datasets, PEFT, checkpoints, logging, accelerate.

    accelerate launch examples/trl_tdpo.py \\
        --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/ultrafeedback_binarized \\
        --output_dir qwen3-tdpo --tdpo_variant tdpo2 --tdpo_alpha 0.5 --beta 0.1 --learning_rate 5e-7 \\
        --per_device_train_batch_size 4 --gradient_accumulation_steps 8 --eval_strategy steps --eval_steps 200

With `--use_peft --lora_target_modules all-linear --learning_rate 5e-6` adapters are trained: there is no second model then, and
one product for both models' logits. `accelerate launch --num_processes 8` and an FSDP2 or ZeRO-2 config work as with TRL.
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from fused_tdpo.integrations.trl import TDPOConfig, TDPOTrainer


def main() -> None:
    script, training, model = TrlParser((ScriptArguments, TDPOConfig, ModelConfig)).parse_args_and_config()
    if model.dtype is not None:
        training.model_init_kwargs = {**(training.model_init_kwargs or {}), "dtype": model.dtype}
    dataset = load_dataset(script.dataset_name, name=script.dataset_config)
    evaluates = training.eval_strategy != "no"
    trainer = TDPOTrainer(
        model.model_name_or_path,
        args=training,
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=dataset[script.dataset_test_split] if evaluates else None,
        peft_config=get_peft_config(model),
    )
    trainer.train()
    if evaluates:
        print(trainer.evaluate())
    trainer.save_model(training.output_dir)


if __name__ == "__main__":
    main()
