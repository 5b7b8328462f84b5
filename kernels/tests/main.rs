//! The kernels against the scalar reference, and what drives a card against one that is not there; one program, since all share what emulates a
//! card. What counts allocations and what runs on a real card are programs of their own.

mod ahead;
mod cuda_compile;
mod cuda_operations;
mod cuda_races;
mod cuda_train;
mod decoder;
mod driver;
mod exchanges;
mod graphs;
mod loading;
mod memory;
mod operations;

mod support;
