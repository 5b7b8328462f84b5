use super::*;

fn backend(threads: usize) -> (CpuBackend, Buf, StepBatch) {
    let limits = Limits { max_tokens: 40, max_samples: 2, max_positions: 64 };
    let mut backend = CpuBackend::new(CpuOptions { threads, isa: None, limits }).unwrap();
    let values: Vec<u8> = (0..40 * 16).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let source = MatrixSource { n: 40, k: 16, format: Format::F32, data: &values, row_order: None };
    backend.load_matrix(&[source], WeightFormat::F32).unwrap();
    let buf = backend.alloc(Rows::Tokens, 16).unwrap();
    let mut batch = StepBatch { tokens: (0..40).rev().collect(), positions: (0..40).collect(), ..StepBatch::default() };
    batch.slots.resize(40, -1);
    batch.sequences.push(SequenceSpan { first_row: 0, rows: 40, context_len: 40, first_block: 0 });
    (backend, buf, batch)
}

#[test]
fn a_panic_in_a_kernel_is_an_error_of_that_step_only() {
    for threads in 1..=4 {
        let (mut backend, buf, batch) = backend(threads);
        for _ in 0..20 {
            backend.begin(&batch).unwrap();
            backend.embedding(Matrix(0), buf);
            // No operation appends this: the shapes are checked. It stands for a defect in a kernel.
            backend.program.push(Entry::Embedding { table: 9, out: buf.0 }, Some(buf.0), 40, 1);
            let error = backend.finish(&mut StepOutput::default()).unwrap_err().to_string();
            assert!(error.contains("index out of bounds"), "{error}");
            backend.begin(&batch).unwrap();
            backend.embedding(Matrix(0), buf);
            backend.finish(&mut StepOutput::default()).unwrap();
            assert_eq!(backend.read(buf).unwrap()[..2], [39.0 * 16.0, 39.0 * 16.0 + 1.0]);
        }
    }
}

#[test]
fn thousands_of_steps_give_the_same_rows() {
    for threads in 1..=4 {
        let (mut backend, buf, mut batch) = backend(threads);
        for round in 0..3000u32 {
            batch.tokens.iter_mut().for_each(|t| *t = (*t + round) % 40);
            backend.begin(&batch).unwrap();
            backend.embedding(Matrix(0), buf);
            backend.finish(&mut StepOutput::default()).unwrap();
            let rows = backend.read(buf).unwrap();
            assert!(rows.chunks(16).zip(&batch.tokens).all(|(row, &t)| row[3] == (t * 16 + 3) as f32), "round {round}");
        }
    }
}

#[test]
fn an_instruction_path_that_is_not_there_is_refused() {
    let limits = Limits { max_tokens: 1, max_samples: 1, max_positions: 1 };
    if Isa::detect() < Isa::Amx {
        assert!(CpuBackend::new(CpuOptions { threads: 1, isa: Some(Isa::Amx), limits }).is_err());
    }
    let backend = CpuBackend::new(CpuOptions { threads: 2, isa: Some(Isa::Portable), limits }).unwrap();
    assert_eq!(backend.describe(), "cpu, baseline instructions, 2 threads");
}
