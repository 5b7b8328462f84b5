//! What fields are that are not given: TRL's and transformers' defaults.

pub(super) fn adam_beta1() -> f64 {
    0.9
}
pub(super) fn adam_beta2() -> f64 {
    0.999
}
pub(super) fn adam_epsilon() -> f64 {
    1e-8
}
pub(super) fn max_grad_norm() -> f64 {
    1.0
}
pub(super) fn per_device_train_batch_size() -> usize {
    8
}
pub(super) fn gradient_accumulation_steps() -> usize {
    1
}
pub(super) fn tokens_per_batch() -> usize {
    4096
}
pub(super) fn num_train_epochs() -> f64 {
    3.0
}
pub(super) fn max_steps() -> i64 {
    -1
}
pub(super) fn seed() -> u64 {
    42
}
pub(super) fn yes() -> bool {
    true
}
pub(super) fn max_length() -> Option<usize> {
    Some(1024)
}
pub(super) fn logging_steps() -> u64 {
    10
}
pub(super) fn save_steps() -> u64 {
    500
}
pub(super) fn metric_for_best_model() -> String {
    "eval_loss".to_owned()
}
