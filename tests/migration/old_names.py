"""Names of the old tools' fields, written down from their sources, not from our tables."""

from __future__ import annotations


def words(text: str) -> list[str]:
    """Return the words of a text."""
    return text.split()


#: Fields of `LLMTrainingParams` of AITraining (src/autotrain/trainers/clm/params.py), with those of
#: its base (trainers/common.py).
AITRAINING = words("""
model project_name data_path train_split valid_split max_samples add_eos_token block_size
model_max_length padding trainer use_flash_attention_2 attn_implementation packing log
disable_gradient_checkpointing logging_steps eval_strategy save_strategy save_steps
save_total_limit auto_find_batch_size mixed_precision lr epochs batch_size warmup_ratio
gradient_accumulation optimizer scheduler weight_decay max_grad_norm seed chat_template
response_only_loss quantization target_modules merge_adapter peft lora_r lora_alpha lora_dropout
model_ref dpo_beta max_prompt_length max_completion_length prompt_text_column text_column
rejected_text_column auto_convert_dataset use_sharegpt_mapping sharegpt_mapping_enabled
suggested_chat_template column_mapping runtime_mapping map_eos_token conversation_extension
apply_chat_template save_processed_data push_to_hub username token repo_id unsloth
distributed_backend use_distillation teacher_model teacher_prompt_template student_prompt_template
distill_temperature distill_alpha distill_max_teacher_length use_sweep sweep_backend sweep_n_trials
sweep_metric sweep_direction sweep_params post_trial_script wandb_sweep wandb_sweep_project
wandb_sweep_entity wandb_sweep_id wandb_run_id use_enhanced_eval eval_metrics eval_dataset_path
eval_batch_size eval_save_predictions eval_benchmark chat_format token_weights rl_gamma
rl_gae_lambda rl_kl_coef rl_value_loss_coef rl_clip_range rl_reward_fn rl_multi_objective
rl_reward_weights rl_env_type rl_env_config rl_reward_model_path rl_num_ppo_epochs rl_chunk_size
rl_mini_batch_size rl_optimize_device_cache rl_value_clip_range rl_max_new_tokens rl_top_k rl_top_p
rl_temperature rl_env_module rl_env_class rl_num_generations use_vllm vllm_mode
vllm_gpu_memory_utilization custom_loss custom_loss_weights custom_metrics use_forward_backward
forward_backward_loss_fn forward_backward_custom_fn gradient_accumulation_steps
manual_optimizer_control optimizer_step_frequency grad_clip_value sample_every_n_steps
sample_prompts sample_temperature sample_top_k sample_top_p manual_checkpoint_control
save_state_every_n_steps load_state_from inference_prompts inference_max_tokens
inference_temperature inference_top_p inference_top_k inference_output
wandb_visualizer wandb_token hub_private
""")

#: Fields of TRL's PPOConfig (trl/experimental/ppo/ppo_config.py, 1.0 to 1.12), without those of
#: transformers' TrainingArguments.
PPO = words("""
dataset_num_proc num_mini_batches total_episodes local_rollout_forward_batch_size
num_sample_generations response_length stop_token stop_token_id temperature missing_eos_penalty
sft_model_path world_size num_total_batches micro_batch_size local_batch_size batch_size
local_mini_batch_size mini_batch_size push_to_hub exp_name reward_model_path model_adapter_name
ref_adapter_name num_ppo_epochs whiten_rewards kl_coef kl_estimator cliprange vf_coef
cliprange_value gamma lam ds3_gather_for_generation run_name logging_steps gradient_checkpointing
bf16 lr_scheduler_kwargs
""")

#: Fields of TRL's PPOConfig up to 0.11 (trl/trainer/ppo_config.py).
OLD_PPO = words("""
exp_name seed log_with task_name model_name query_dataset reward_model remove_unused_columns
tracker_kwargs accelerator_kwargs project_kwargs tracker_project_name push_to_hub_if_best_kwargs
steps learning_rate adap_kl_ctrl init_kl_coef kl_penalty target horizon gamma lam cliprange
cliprange_value vf_coef batch_size forward_batch_size mini_batch_size gradient_accumulation_steps
world_size ppo_epochs max_grad_norm optimize_cuda_cache optimize_device_cache early_stopping
target_kl compare_steps ratio_threshold use_score_scaling use_score_norm score_clip
is_encoder_decoder is_peft_model backward_batch_size global_backward_batch_size global_batch_size
""")

#: Fields of TRL's RewardConfig, without those of transformers' TrainingArguments.
REWARD = words("""
learning_rate model_init_kwargs trust_remote_code chat_template_path disable_dropout
dataset_num_proc eos_token pad_token max_length pad_to_multiple_of center_rewards_coefficient
activation_offloading remove_unused_columns
""")
