//! The `tidemill` binary.

fn main() -> std::process::ExitCode {
    tidemill::cli::run()
}
