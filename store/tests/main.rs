//! The store over its two databases; one program, since linking takes longer than compiling.

mod adapters;
mod audit;
mod base_scores;
mod comparisons;
mod erasure;
mod files;
mod fine_tuning;
mod keys;
mod kill;
mod label;
mod label_external;
mod lineage;
mod loops;
mod outage;
mod records;
mod retention;
mod rollouts;
mod snapshots;
mod stored;
mod traffic;

mod support;
