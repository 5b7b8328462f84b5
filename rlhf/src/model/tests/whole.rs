use super::*;

fn whole(path: &str, options: ModelOptions) -> Model {
    let model = Model::whole(open(path), options).unwrap();
    let mut random = Random::new(4);
    // Norms of a new model are all 1, biases 0: nothing that could be mistaken for each other.
    for parameter in model.parameters().iter().filter(|parameter| parameter.name.contains("norm")) {
        parameter.change(|values| values.iter_mut().for_each(|v| *v += (random.unit() - 0.5) as f32 * 0.4)).unwrap();
    }
    model
}

fn values(model: &Model, batch: &Packed, pass: Pass) -> Vec<f32> {
    model.log_probs(batch, pass).unwrap().to_vec1::<f32>().unwrap()
}

#[test]
fn before_training_a_whole_model_is_its_files_bit_for_bit() {
    for path in ["llama", "llama/llama.gguf", "llama3", "mistral", "qwen2", "qwen3", "yarn"] {
        for precision in [Precision::F32, Precision::Bf16] {
            let model = Model::whole(open(path), ModelOptions { precision, ..EXACT }).unwrap();
            assert_eq!(model.parameters().elements() as u64, model.files().parameters(), "{path}");
            let batch = pairs(true);
            assert_eq!(values(&model, &batch, Pass::EVALUATE), values(&model, &batch, Pass::REFERENCE), "{path}");
            assert_eq!(values(&model, &batch, Pass::TRAIN), values(&model, &batch, Pass::REFERENCE), "{path}");
            // What is trained changes one and not the other.
            let before = values(&model, &batch, Pass::REFERENCE);
            let last = model.parameters().iter().last().unwrap();
            last.change(|values| values.iter_mut().for_each(|value| *value *= 1.5)).unwrap();
            assert_ne!(values(&model, &batch, Pass::EVALUATE), before, "{path}");
            assert_eq!(values(&model, &batch, Pass::REFERENCE), before, "{path}");
        }
    }
}

#[test]
fn gradients_of_all_numbers_are_those_of_the_plain_computation() {
    // Tied and untied, with biases, with norms on heads, with stretched frequencies.
    for path in ["llama", "llama3", "qwen2", "qwen3"] {
        let model = whole(path, EXACT);
        for shared in [true, false] {
            let batch = pairs(shared);
            let (loss, found) = gradients(&model, &batch, Pass::TRAIN);
            let plain = weighed(&naive::log_probs(&model, &batch).unwrap());
            let difference = (f64::from(plain.to_scalar::<f32>().unwrap()) - loss).abs();
            assert!(difference < 1e-3, "{path}: {difference}");
            let store = plain.backward().unwrap();
            let mut first = 0;
            for parameter in model.parameters().iter() {
                let expected = store.get(parameter.var.as_tensor()).unwrap().to_vec1::<f32>().unwrap();
                let own = &found[first..first + expected.len()];
                first += expected.len();
                near(&expected, own, 1e-4, &format!("{path} {}", parameter.name));
            }
            assert_eq!(first, found.len());
        }
    }
}

#[test]
fn gradients_of_every_kind_of_weight_are_those_of_finite_differences() {
    for path in ["llama", "qwen2", "qwen3"] {
        let model = whole(path, EXACT);
        let batch = pairs(true);
        let (_, gradient) = gradients(&model, &batch, Pass::TRAIN);
        let Kind::Whole(ends) = &model.kind else { panic!("it is whole") };
        // The ends, and one layer of the middle.
        let weights = model.files().config().weights().into_iter();
        for weight in weights.filter(|weight| !matches!(weight, Weight::Layer(0 | 2.., _))) {
            let (var, range) = model.place(ends, weight).unwrap();
            let mut before = model.parameters().iter().scan(0, |next, parameter| {
                let first = *next;
                *next += parameter.var.elem_count();
                Some((parameter, first))
            });
            let (parameter, first) =
                before.find(|(parameter, _)| parameter.var.as_tensor().id() == var.as_tensor().id()).unwrap();
            let own = &gradient[first + range.start..first + range.end];
            let original = parameter.values().unwrap();
            let mut random = Random::new(first as u64 + range.start as u64);
            let direction: Vec<f32> = range.clone().map(|_| random.unit() as f32 - 0.5).collect();
            let along = |step: f32| {
                let mut moved = original.clone();
                moved[range.clone()].iter_mut().zip(&direction).for_each(|(value, d)| *value += step * d);
                parameter.set(&moved).unwrap();
                gradients(&model, &batch, Pass { gradient: false, ..Pass::TRAIN }).0
            };
            let step = 1e-3;
            let want = (along(step) - along(-step)) / (2.0 * f64::from(step));
            parameter.set(&original).unwrap();
            let got: f64 = own.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
            let size = own.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            assert!(size > 0.0, "{path} {weight:?} has no gradient");
            assert!((got - want).abs() <= 0.02 * size.max(0.5), "{path} {weight:?}: {got}, not {want}, of {size}");
        }
    }
}

#[test]
fn packing_recomputation_and_threads_change_nothing_of_a_whole_model() {
    let model = whole("qwen2", EXACT);
    let (loss, gradient) = gradients(&model, &pairs(true), Pass::TRAIN);
    let (other, apart) = gradients(&model, &pairs(false), Pass::TRAIN);
    assert!((loss - other).abs() < 1e-3, "{loss} and {other}");
    near(&gradient, &apart, 1e-4, "shared and separate prompts");
    for options in [ModelOptions { recompute: true, ..EXACT }, ModelOptions { threads: 1, ..EXACT }] {
        assert_eq!(gradients(&whole("qwen2", options), &pairs(true), Pass::TRAIN).1, gradient, "{options:?}");
    }
    // An adapter's dropout is none of a whole model's business.
    assert_eq!(gradients(&model, &pairs(true), Pass { dropout: Some(3), ..Pass::TRAIN }).1, gradient);
}

#[test]
fn what_is_written_is_what_was_trained() {
    let place = tempfile::tempdir().unwrap();
    for (path, storage) in [("llama", Format::F32), ("qwen3/qwen3.gguf", Format::F32), ("qwen2", Format::Bf16)] {
        let precision = if storage == Format::F32 { Precision::F32 } else { Precision::Bf16 };
        let model = whole(path, ModelOptions { precision, ..EXACT });
        model.parameters().iter().last().unwrap().change(|values| values.iter_mut().for_each(|v| *v *= 1.01)).unwrap();
        let to = place.path().join(path.replace('/', "-"));
        model.write(&to, storage).unwrap();
        let again = Model::whole(Arc::new(ModelFiles::open(&to).unwrap()), ModelOptions { precision, ..EXACT }).unwrap();
        let batch = pairs(true);
        let (found, expected) = (values(&again, &batch, Pass::EVALUATE), values(&model, &batch, Pass::EVALUATE));
        if storage == Format::F32 {
            assert_eq!(found, expected, "{path}");
            for (a, b) in again.parameters().iter().zip(model.parameters().iter()) {
                assert_eq!((&a.name, a.values().unwrap()), (&b.name, b.values().unwrap()), "{path}");
            }
        } else {
            // Rows of the embedding go into the residual stream as they are, so those do lose something.
            near(&expected, &found, 5e-3, path);
        }
    }
    let model = whole("llama", EXACT);
    assert!(matches!(model.adapter("llama"), Err(ModelError::Kind(_))));
    let adapted = Model::new(open("llama"), &LoraConfig::default(), 1, EXACT).unwrap();
    assert!(matches!(adapted.write(&place.path().join("none"), Format::F32), Err(ModelError::Kind(_))));
    // A token beyond the table is named, not read.
    let mut batch = Packed::default();
    batch.push(&[1, 2, 1_000_000], None);
    batch.labels.push(Label { row: 0, token: 2 });
    assert!(matches!(model.log_probs(&batch, Pass::TRAIN), Err(ModelError::Token { token: 1_000_000, .. })));
}
