//! A Llama with random weights, as files.

use std::io::Write;
use std::path::Path;

use serde_json::{Map, Value, json};

/// Sizes of a Llama.
#[derive(Clone, Copy)]
pub struct Llama {
    pub layers: usize,
    pub hidden: usize,
    pub ffn: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocabulary: usize,
    pub positions: usize,
}

impl Llama {
    pub fn eight_b() -> Self {
        Llama {
            layers: 32,
            hidden: 4096,
            ffn: 14336,
            heads: 32,
            kv_heads: 8,
            head_dim: 128,
            vocabulary: 128_256,
            positions: 8192,
        }
    }

    pub fn tiny() -> Self {
        Llama { layers: 2, hidden: 64, ffn: 96, heads: 4, kv_heads: 2, head_dim: 16, vocabulary: 300, positions: 64 }
    }

    /// Names and shapes of the tensors.
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let &Llama { hidden, ffn, heads, kv_heads, head_dim, vocabulary, .. } = self;
        let (queries, keys) = (heads * head_dim, kv_heads * head_dim);
        let mut all = vec![("model.embed_tokens.weight".to_owned(), vec![vocabulary, hidden])];
        for layer in 0..self.layers {
            let parts = [
                ("input_layernorm", vec![hidden]),
                ("self_attn.q_proj", vec![queries, hidden]),
                ("self_attn.k_proj", vec![keys, hidden]),
                ("self_attn.v_proj", vec![keys, hidden]),
                ("self_attn.o_proj", vec![hidden, queries]),
                ("post_attention_layernorm", vec![hidden]),
                ("mlp.gate_proj", vec![ffn, hidden]),
                ("mlp.up_proj", vec![ffn, hidden]),
                ("mlp.down_proj", vec![hidden, ffn]),
            ];
            all.extend(parts.map(|(part, shape)| (format!("model.layers.{layer}.{part}.weight"), shape)));
        }
        all.extend([("model.norm.weight".to_owned(), vec![hidden]), ("lm_head.weight".to_owned(), vec![vocabulary, hidden])]);
        all
    }

    /// Weights that a decoded token multiplies: all matrices but the embedding.
    pub fn multiplied(&self) -> usize {
        let matrices = self.tensors().into_iter().filter(|(name, shape)| shape.len() == 2 && !name.contains("embed"));
        matrices.map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }

    /// Bytes of a token's keys and values in bf16.
    pub fn kv_bytes(&self) -> usize {
        self.layers * self.kv_heads * self.head_dim * 2 * 2
    }

    /// Writes `config.json`, `tokenizer.json` and bf16 weights.
    pub fn write(&self, folder: &Path) -> std::io::Result<()> {
        std::fs::create_dir_all(folder)?;
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0, "tie_word_embeddings": false, "hidden_size": self.hidden, "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim, "vocab_size": self.vocabulary, "max_position_embeddings": self.positions,
        });
        std::fs::write(folder.join("config.json"), config.to_string())?;
        std::fs::write(folder.join("tokenizer.json"), tokenizer().to_string())?;
        let mut header = Map::new();
        let mut end = 0;
        for (name, shape) in self.tensors() {
            let begin = end;
            end += 2 * shape.iter().product::<usize>();
            header.insert(name, json!({ "dtype": "BF16", "shape": shape, "data_offsets": [begin, end] }));
        }
        let mut header = Value::Object(header).to_string();
        header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
        let mut file = std::io::BufWriter::with_capacity(1 << 20, std::fs::File::create(folder.join("model.safetensors"))?);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        // Random numbers for all would take minutes; each tensor begins at another place of these.
        let random = random_bf16(8 << 20);
        for (number, (_, shape)) in self.tensors().into_iter().enumerate() {
            let count = shape.iter().product::<usize>();
            if shape.len() == 1 {
                file.write_all(&0x3f80u16.to_le_bytes().repeat(count))?;
                continue;
            }
            let (mut left, mut at) = (2 * count, number * 99_991 % (random.len() / 2) * 2);
            while left > 0 {
                let piece = &random[at..(at + left).min(random.len())];
                file.write_all(piece)?;
                left -= piece.len();
                at = 0;
            }
        }
        file.flush()
    }
}

/// Numbers around 0 of a deviation of about 0.02, as bytes.
fn random_bf16(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        // Xorshift (Marsaglia 2003).
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..count).flat_map(|_| (((next() * 0.07).to_bits() >> 16) as u16).to_le_bytes()).collect()
}

/// One token for each byte.
fn tokenizer() -> Value {
    let vocabulary: Map<String, Value> = (0..=255u8).map(|byte| (printable(byte).to_string(), byte.into())).collect();
    let level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let model = json!({ "type": "BPE", "vocab": vocabulary, "merges": [] });
    json!({ "version": "1.0", "added_tokens": [], "pre_tokenizer": level, "decoder": level, "model": model })
}

/// GPT-2's printable stand-in for a byte.
fn printable(byte: u8) -> char {
    let own = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if own(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !own(*b)).count() as u32;
    char::from_u32(256 + before).unwrap_or('?')
}
