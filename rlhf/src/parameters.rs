//! What training changes, in an order of its own: candle's maps have none.

use candle_core::{CpuStorage, DType, Error, InplaceOp1, Layout, Result, Storage, Tensor, Var, bail};

/// A named variable.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// Unique among the parameters.
    pub name: String,
    /// f32, contiguous, on the CPU.
    pub var: Var,
}

/// Parameters in the order in which they were added.
#[derive(Clone, Debug, Default)]
pub struct Parameters(Vec<Parameter>);

impl Parameters {
    /// Adds one at the end. Fails for a name that is taken and for anything but f32.
    pub fn push(&mut self, name: impl Into<String>, var: Var) -> Result<()> {
        let name = name.into();
        if self.0.iter().any(|other| other.name == name) {
            bail!("two parameters are called {name}");
        }
        if var.dtype() != DType::F32 || !var.is_contiguous() {
            bail!("parameter {name} must be contiguous f32, it is {:?}", var.dtype());
        }
        self.0.push(Parameter { name, var });
        Ok(())
    }

    /// All of them, in order.
    pub fn iter(&self) -> std::slice::Iter<'_, Parameter> {
        self.0.iter()
    }

    /// How many numbers they hold.
    pub fn elements(&self) -> usize {
        self.iter().map(|parameter| parameter.var.elem_count()).sum()
    }
}

impl Parameter {
    /// Copies the numbers out.
    pub fn values(&self) -> Result<Vec<f32>> {
        read(self.var.as_tensor(), <[f32]>::to_vec)
    }

    /// Replaces the numbers.
    pub fn set(&self, values: &[f32]) -> Result<()> {
        if values.len() != self.var.elem_count() {
            bail!("{} holds {} numbers, not {}", self.name, self.var.elem_count(), values.len());
        }
        self.change(|own| own.copy_from_slice(values))
    }

    /// Changes the numbers in place.
    pub fn change(&self, edit: impl FnOnce(&mut [f32])) -> Result<()> {
        struct Edit<F>(std::cell::Cell<Option<F>>);
        impl<F: FnOnce(&mut [f32])> InplaceOp1 for Edit<F> {
            fn name(&self) -> &'static str {
                "change"
            }

            fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
                match (storage, layout.contiguous_offsets(), self.0.take()) {
                    (CpuStorage::F32(values), Some((start, end)), Some(edit)) => {
                        edit(&mut values[start..end]);
                        Ok(())
                    }
                    _ => Err(Error::Msg("a parameter is contiguous f32".to_owned())),
                }
            }
        }
        self.var.as_tensor().inplace_op1(&Edit(std::cell::Cell::new(Some(edit))))
    }
}

/// Looks at the numbers of an f32 tensor without copying those that are contiguous.
pub(crate) fn read<T>(tensor: &Tensor, look: impl FnOnce(&[f32]) -> T) -> Result<T> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(storage), Some((start, end))) => Ok(look(&storage.as_slice::<f32>()?[start..end])),
        _ => bail!("numbers are read on the CPU only"),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn parameters_keep_their_order_and_change_in_place() {
        let var = |values: &[f32]| Var::new(values, &Device::Cpu).unwrap();
        let mut parameters = Parameters::default();
        parameters.push("z", var(&[1.0, 2.0])).unwrap();
        parameters.push("a", var(&[3.0])).unwrap();
        assert!(parameters.push("z", var(&[1.0])).unwrap_err().to_string().contains("two parameters are called z"));
        assert_eq!(parameters.iter().map(|parameter| parameter.name.as_str()).collect::<Vec<_>>(), ["z", "a"]);
        assert_eq!(parameters.elements(), 3);
        let first = parameters.iter().next().unwrap();
        let seen = first.var.as_tensor().clone();
        first.change(|values| values[1] = 7.0).unwrap();
        assert_eq!(seen.to_vec1::<f32>().unwrap(), [1.0, 7.0]);
        first.set(&[5.0, 6.0]).unwrap();
        assert_eq!(first.values().unwrap(), [5.0, 6.0]);
        assert!(first.set(&[1.0]).is_err());
    }
}
