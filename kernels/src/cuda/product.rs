//! Matrix products of many rows, by cuBLASLt.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublas::sys::cublasOperation_t;
use cudarc::cublaslt::{result, sys};
use cudarc::driver::sys::CUstream;

use super::calls::Multiplier;
use super::device::{Address, Operands, Product};
use super::libraries::Library;
use crate::error::KernelError;

/// What the library made of a shape.
struct Plan {
    describes: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// Operands, rows, output features, input features.
type Shape = (Operands, usize, usize, usize);

/// The library, and its plans.
pub(super) struct Products {
    handle: sys::cublasLtHandle_t,
    /// Memory that the library may use for a product.
    workspace: (Address, usize),
    plans: HashMap<Shape, Plan>,
}

fn failed(what: &str, e: result::CublasError) -> KernelError {
    KernelError::Device(format!("cuBLASLt {what}: {e:?}"))
}

// SAFETY: the library's handles, which may be used from any thread.
unsafe impl Send for Products {}

impl Products {
    pub(super) fn open(workspace: Address, bytes: usize) -> Result<Self, KernelError> {
        Library::CublasLt.require()?;
        let handle = result::create_handle()
            .map_err(|e| failed("does not start (one of a newer major version than the driver's CUDA does not)", e))?;
        Ok(Products { handle, workspace: (workspace, bytes), plans: HashMap::new() })
    }

    fn plan(&self, (operands, rows, n, stride): Shape) -> Result<Plan, KernelError> {
        let f32 = sys::cudaDataType_t::CUDA_R_32F;
        // Of 8-bit floats the library multiplies a transposed matrix with one that is not, in f32: what this does of bf16 as well. Their
        // scales are 1 where nobody sets them.
        let kind = match operands {
            Operands::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
            Operands::Fp8 => sys::cudaDataType_t::CUDA_R_8F_E4M3,
        };
        let [rows, n, k] = [rows, n, stride].map(|v| v as u64);
        let describes = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, f32)
            .map_err(|e| failed("describes nothing", e))?;
        let layout = |kind, rows: u64, columns| {
            result::create_matrix_layout(kind, rows, columns, rows as i64).map_err(|e| failed("has no layout", e))
        };
        let (w, x, out) = (layout(kind, k, n)?, layout(kind, k, rows)?, layout(f32, n, rows)?);
        let transposed = cublasOperation_t::CUBLAS_OP_T;
        let preference = result::create_matmul_pref().map_err(|e| failed("has no preferences", e))?;
        let size = self.workspace.1;
        // SAFETY: descriptions that were just made; values of the types that the attributes have.
        let found = unsafe {
            let transa = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
            let most = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            result::set_matmul_desc_attribute(describes, transa, (&raw const transposed).cast(), size_of_val(&transposed))
                .and_then(|()| result::set_matmul_pref_attribute(preference, most, (&raw const size).cast(), size_of_val(&size)))
                .and_then(|()| result::get_matmul_algo_heuristic(self.handle, describes, w, x, out, out, preference))
        };
        // SAFETY: made above, destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(preference) };
        let found = found.map_err(|e| match operands {
            Operands::Bf16 => failed("knows no way to multiply", e),
            Operands::Fp8 => failed("knows no way to multiply 8-bit floats; leave --activations at bf16", e),
        })?;
        Ok(Plan { describes, w, x, out, algorithm: found.algo })
    }
}

impl Multiplier for Products {
    /// `out = x wᵀ`, which is `outᵀ = w xᵀ` for a library that counts by columns: w is transposed there, x and out lie as they should.
    fn run(&mut self, p: Product, stream: CUstream) -> Result<(), KernelError> {
        let shape = (p.operands, p.rows, p.n, p.stride);
        if !self.plans.contains_key(&shape) {
            let plan = self.plan(shape)?;
            self.plans.insert(shape, plan);
        }
        let Some(plan) = self.plans.get(&shape) else { return Ok(()) };
        let (one, beta) = (1.0f32, if p.add { 1.0f32 } else { 0.0 });
        let at = |place: Address| place.0 as *mut c_void;
        let number = |value: &f32| (value as *const f32).cast::<c_void>();
        let (workspace, bytes) = self.workspace;
        // SAFETY: the plan is for these shapes, and the backend's memory holds them.
        unsafe {
            result::matmul(
                self.handle,
                plan.describes,
                number(&one),
                number(&beta),
                at(p.w),
                plan.w,
                at(p.x),
                plan.x,
                at(p.out),
                plan.out,
                at(p.out),
                plan.out,
                &plan.algorithm,
                at(workspace),
                bytes,
                stream.cast(),
            )
        }
        .map_err(|e| failed("refuses a product", e))
    }

    fn close(&mut self) {
        for (_, plan) in self.plans.drain() {
            // SAFETY: made by `plan`, destroyed once; nothing can be done about failures.
            unsafe {
                let _ = result::destroy_matmul_desc(plan.describes);
                for layout in [plan.w, plan.x, plan.out] {
                    let _ = result::destroy_matrix_layout(layout);
                }
            }
        }
        if !self.handle.is_null() {
            // SAFETY: made by `open`, destroyed once.
            let _ = unsafe { result::destroy_handle(self.handle) };
            self.handle = std::ptr::null_mut();
        }
    }
}
