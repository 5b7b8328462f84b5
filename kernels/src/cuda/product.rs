//! Matrix products of many rows, by cuBLASLt.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::hash::Hash;
use std::mem::MaybeUninit;
use std::ptr::null_mut;

use cudarc::cublas::sys::cublasOperation_t;
use cudarc::cublaslt::sys;
use cudarc::driver::sys::CUstream;

use super::calls::Multiplier;
use super::device::{Address, Operands, Product};
use super::functions::{CublasLtFunctions, Outcome, words};
use crate::error::KernelError;

/// Plans that are kept. Prompts bring steps of ever other numbers of rows, each with a plan for every shape of weights.
const MOST_PLANS: usize = 1024;

/// `CUBLAS_STATUS_ALLOC_FAILED`: the card is none the worse.
const ALLOC_FAILED: Outcome = 3;

/// A description, a preference or a layout, destroyed with its owner.
struct Held<T: Copy>(T, unsafe extern "C" fn(T) -> Outcome);

impl<T: Copy> Drop for Held<T> {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once; nothing can be done about a failure.
        let _ = unsafe { (self.1)(self.0) };
    }
}

type Layout = Held<sys::cublasLtMatrixLayout_t>;

/// What the library made of a shape.
struct Plan {
    describes: Held<sys::cublasLtMatmulDesc_t>,
    w: Layout,
    x: Layout,
    out: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// Operands, rows, output features, input features.
type Shape = (Operands, usize, usize, usize);

fn shape(p: Product) -> Shape {
    (p.operands, p.rows, p.n, p.stride)
}

/// What was used last, up to a bound.
struct Recent<K, V> {
    most: usize,
    held: HashMap<K, (V, u64)>,
    uses: u64,
}

impl<K: Hash + Eq + Copy, V> Recent<K, V> {
    fn new(most: usize) -> Self {
        Recent { most, held: HashMap::new(), uses: 0 }
    }

    fn get(&mut self, key: K) -> Option<&V> {
        self.uses += 1;
        let (value, used) = self.held.get_mut(&key)?;
        *used = self.uses;
        Some(value)
    }

    /// In the place of what was not used for the longest time, where there is no other.
    fn insert(&mut self, key: K, value: V) {
        if self.held.len() >= self.most
            && let Some(oldest) = self.held.iter().min_by_key(|(_, (_, used))| *used).map(|(key, _)| *key)
        {
            self.held.remove(&oldest);
        }
        self.uses += 1;
        self.held.insert(key, (value, self.uses));
    }
}

/// The library, and its plans.
pub(super) struct Products {
    lt: &'static CublasLtFunctions,
    handle: sys::cublasLtHandle_t,
    /// Memory that the library may use for a product.
    workspace: (Address, usize),
    plans: Recent<Shape, Plan>,
}

// SAFETY: the library's handles, which may be used from any thread.
unsafe impl Send for Products {}

impl Products {
    pub(super) fn open(workspace: Address, bytes: usize) -> Result<Self, KernelError> {
        let lt = CublasLtFunctions::find()?;
        let mut handle = null_mut();
        // SAFETY: a place to write to.
        let made = unsafe { (lt.create)(&raw mut handle) };
        told(lt, "does not start (one of a newer major version than the driver's CUDA does not)", made)?;
        Ok(Products { lt, handle, workspace: (workspace, bytes), plans: Recent::new(MOST_PLANS) })
    }

    fn layout(&self, kind: sys::cudaDataType_t, rows: u64, columns: u64) -> Result<Layout, KernelError> {
        let mut made = null_mut();
        // SAFETY: a place to write to.
        told(self.lt, "has no layout", unsafe { (self.lt.create_layout)(&raw mut made, kind, rows, columns, rows as i64) })?;
        Ok(Held(made, self.lt.destroy_layout))
    }

    fn make_plan(&self, (operands, rows, n, stride): Shape) -> Result<Plan, KernelError> {
        let (lt, f32) = (self.lt, sys::cudaDataType_t::CUDA_R_32F);
        // Of 8-bit floats the library multiplies a transposed matrix with one that is not, in f32: what this does of bf16 as well. Their
        // scales are 1 where nobody sets them.
        let kind = match operands {
            Operands::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
            Operands::Fp8 => sys::cudaDataType_t::CUDA_R_8F_E4M3,
        };
        let [rows, n, k] = [rows, n, stride].map(|v| v as u64);
        let mut describes = null_mut();
        // SAFETY: a place to write to.
        let made = unsafe { (lt.create_description)(&raw mut describes, sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, f32) };
        told(lt, "describes nothing", made)?;
        let describes = Held(describes, lt.destroy_description);
        let (w, x, out) = (self.layout(kind, k, n)?, self.layout(kind, k, rows)?, self.layout(f32, n, rows)?);
        let mut preference = null_mut();
        // SAFETY: a place to write to.
        told(lt, "has no preferences", unsafe { (lt.create_preference)(&raw mut preference) })?;
        let preference = Held(preference, lt.destroy_preference);
        let (transposed, size) = (cublasOperation_t::CUBLAS_OP_T, self.workspace.1);
        let transa = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        let most = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: descriptions that were just made; values of the types that the attributes have.
        unsafe {
            let described = (lt.describe)(describes.0, transa, (&raw const transposed).cast(), size_of_val(&transposed));
            told(lt, "takes no transposed matrix", described)?;
            told(lt, "takes no workspace", (lt.prefer)(preference.0, most, (&raw const size).cast(), size_of_val(&size)))?;
        }
        // What it finds has a status of its own, which is good where something is found: it is never read, and need be none that we know.
        let (mut found, mut count): (MaybeUninit<sys::cublasLtMatmulHeuristicResult_t>, c_int) = (MaybeUninit::zeroed(), 0);
        // SAFETY: what was made above; room for one result.
        let looked = unsafe {
            let results = found.as_mut_ptr().cast();
            (lt.heuristic)(self.handle, describes.0, w.0, x.0, out.0, out.0, preference.0, 1, results, &raw mut count)
        };
        let what = match operands {
            Operands::Bf16 => "knows no way to multiply",
            Operands::Fp8 => "knows no way to multiply 8-bit floats; leave --activations at bf16",
        };
        told(lt, what, looked)?;
        if count < 1 {
            return Err(KernelError::Device(format!("cuBLASLt {what}")));
        }
        // SAFETY: zeros, and what the library has written; numbers alone.
        let algorithm = unsafe { (*found.as_ptr()).algo };
        Ok(Plan { describes, w, x, out, algorithm })
    }
}

fn told(lt: &CublasLtFunctions, what: &str, outcome: Outcome) -> Result<(), KernelError> {
    if outcome == 0 {
        return Ok(());
    }
    if outcome == ALLOC_FAILED {
        return Err(KernelError::Memory { what: "a matrix product", bytes: 0 });
    }
    // SAFETY: the library has a text that stays for every number, its own or one that says that it does not know it.
    let name = unsafe { words((lt.status_name)(outcome)) };
    Err(KernelError::Device(format!("cuBLASLt {what}: {name} ({outcome})")))
}

impl Multiplier for Products {
    fn has_plan(&mut self, product: Product) -> bool {
        self.plans.get(shape(product)).is_some()
    }

    fn plan(&mut self, product: Product) -> Result<(), KernelError> {
        let plan = self.make_plan(shape(product))?;
        self.plans.insert(shape(product), plan);
        Ok(())
    }

    /// `out = x wᵀ`, which is `outᵀ = w xᵀ` for a library that counts by columns: w is transposed there, x and out lie as they should.
    fn run(&mut self, p: Product, stream: CUstream) -> Result<(), KernelError> {
        let unplanned = || KernelError::Device("a matrix product was asked for without a plan".into());
        let plan = self.plans.get(shape(p)).ok_or_else(unplanned)?;
        let (one, beta) = (1.0f32, if p.add { 1.0f32 } else { 0.0 });
        let at = |place: Address| place.0 as *mut c_void;
        let number = |value: &f32| (value as *const f32).cast::<c_void>();
        let (workspace, bytes) = self.workspace;
        // SAFETY: the plan is for these shapes, and the backend's memory holds them.
        let multiplied = unsafe {
            (self.lt.multiply)(
                self.handle,
                plan.describes.0,
                number(&one),
                at(p.w),
                plan.w.0,
                at(p.x),
                plan.x.0,
                number(&beta),
                at(p.out),
                plan.out.0,
                at(p.out),
                plan.out.0,
                &raw const plan.algorithm,
                at(workspace),
                bytes,
                stream.cast(),
            )
        };
        told(self.lt, "refuses a product", multiplied)
    }

    fn close(&mut self) {
        self.plans = Recent::new(0);
        if !self.handle.is_null() {
            // SAFETY: made by `open`, destroyed once.
            let _ = unsafe { (self.lt.destroy)(self.handle) };
            self.handle = null_mut();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_used_for_the_longest_time_makes_room() {
        let mut recent = Recent::new(2);
        recent.insert(1, 'a');
        recent.insert(2, 'b');
        assert_eq!(recent.get(1), Some(&'a'));
        recent.insert(3, 'c');
        assert_eq!([1, 2, 3].map(|key| recent.get(key).copied()), [Some('a'), None, Some('c')]);
        assert_eq!(recent.held.len(), 2);
    }
}
