//! What configurations say and what is wrong with them.

use serde_json::json;

use super::*;

#[test]
fn a_method_alone_is_a_configuration_with_the_fields_own_defaults() {
    let config = TrainConfig::from_json(json!({"method": "dpo"})).unwrap();
    assert_eq!((config.learning_rate(), config.dropout(), config.max_length), (1e-6, false, Some(1024)));
    let expected = Objective::Dpo { loss: PairLoss::Sigmoid, beta: 0.1, imitate: 0.0 };
    assert_eq!(config.objective().unwrap(), expected);
    assert_eq!(TrainConfig::new(Method::Dpo), config);
    assert!(TrainConfig::new(Method::Sft).dropout());
    let again = TrainConfig::from_json(serde_json::to_value(&config).unwrap()).unwrap();
    assert_eq!(again, config);
}

#[test]
fn losses_have_trls_names() {
    let loss = |name: &str, epsilon: f64| {
        let fields = json!({"method": "dpo", "loss_type": name, "label_smoothing": epsilon});
        match TrainConfig::from_json(fields).unwrap().objective().unwrap() {
            Objective::Dpo { loss, .. } => loss,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(loss("sigmoid", 0.1), PairLoss::Conservative { epsilon: 0.1 });
    assert_eq!(loss("robust", 0.1), PairLoss::Robust { epsilon: 0.1 });
    let plain = [
        ("hinge", PairLoss::Hinge),
        ("ipo", PairLoss::Ipo),
        ("sigmoid_norm", PairLoss::SigmoidNorm),
        ("apo_zero", PairLoss::ApoZero),
    ];
    for (name, expected) in plain {
        assert_eq!(loss(name, 0.0), expected);
    }
}

#[test]
fn what_is_wrong_is_named() {
    for (fields, expected) in [
        (json!({"method": "dpo", "betta": 0.1}), "unknown field `betta`"),
        (json!({"method": "pro"}), "unknown variant `pro`"),
        (json!({"beta": 0.1}), "missing field `method`"),
        (json!({"method": "sft", "beta": 0.1}), "beta is not used by sft; leave it out"),
        (json!({"method": "dpo", "beta": 0}), "beta must be above 0, it is 0"),
        (
            json!({"method": "dpo", "loss_type": "ipo", "label_smoothing": 0.1}),
            "label_smoothing is for loss_type sigmoid and robust",
        ),
        (json!({"method": "dpo", "label_smoothing": 0.5}), "label_smoothing must be at least 0 and below 0.5"),
        (json!({"method": "sft", "max_steps": 0}), "max_steps must be above 0, or -1 for epochs"),
        (json!({"method": "sft", "learning_rate": -1.0}), "learning_rate must be above 0"),
        (json!({"method": "sft", "rater_weights": {"r": -1.0}}), "rater_weights must be 0 or above"),
        (json!({"method": "sft", "max_length": 1}), "max_length must leave room"),
    ] {
        let error = TrainConfig::from_json(fields).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn warm_up_is_given_in_steps_or_as_a_share() {
    let mut config = TrainConfig { warmup_ratio: 0.1, ..TrainConfig::new(Method::Sft) };
    assert_eq!(config.schedule(25).warmup, 3);
    config.warmup_steps = 7;
    assert_eq!(config.schedule(25).warmup, 7);
}
