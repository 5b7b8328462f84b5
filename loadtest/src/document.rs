//! The place in a document that belongs to the comparison: between two markers, and nothing outside them changes.

use crate::error::LoadtestError;
use crate::markdown::Report;
use crate::plot;
use std::path::Path;

/// Opening marker.
pub const BEGIN: &str = "<!-- bench:begin -->";
/// Closing marker.
pub const END: &str = "<!-- bench:end -->";

/// Whether the document is there and has its markers: asked before an hour of measuring, not after.
pub fn check(path: &Path) -> Result<(), LoadtestError> {
    replace(path, "").map(drop)
}

/// Writes the tables between the markers, and the plot beside the document under its name with `-bench.svg`.
pub fn write(path: &Path, report: &Report<'_>) -> Result<(), LoadtestError> {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let plot_name = format!("{stem}-bench.svg");
    let document = replace(path, &report.markdown(Some(&plot_name)))?;
    let plot_path = path.with_file_name(&plot_name);
    std::fs::write(&plot_path, plot::svg(report)).map_err(LoadtestError::file(&plot_path))?;
    std::fs::write(path, document).map_err(LoadtestError::file(path))
}

fn replace(path: &Path, with: &str) -> Result<String, LoadtestError> {
    let document = std::fs::read_to_string(path).map_err(LoadtestError::file(path))?;
    let markers = || LoadtestError::Markers { path: path.to_owned(), begin: BEGIN, end: END };
    let (before, rest) = document.split_once(BEGIN).ok_or_else(markers)?;
    let (_, after) = rest.split_once(END).ok_or_else(markers)?;
    Ok(format!("{before}{BEGIN}\n\n{}\n\n{END}{after}", with.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::markdown::tests::sample;

    #[test]
    fn only_what_is_between_the_markers_changes_and_writing_twice_is_writing_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("benchmarks.md");
        std::fs::write(&path, format!("# Title\n\n{BEGIN}\nSTALE\n{END}\n\nAfter.\n")).unwrap();
        let (plan, results) = sample();
        let report = Report { plan: &plan, results: &results, interrupted: false };
        check(&path).unwrap();
        write(&path, &report).unwrap();
        let once = std::fs::read_to_string(&path).unwrap();
        assert!(once.starts_with(&format!("# Title\n\n{BEGIN}\n\n")) && once.ends_with(&format!("\n\n{END}\n\nAfter.\n")));
        assert!(!once.contains("STALE") && once.contains("benchmarks-bench.svg"));
        assert!(folder.path().join("benchmarks-bench.svg").exists());
        write(&path, &report).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), once);
    }

    #[test]
    fn a_document_without_markers_is_refused_untouched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.md");
        std::fs::write(&path, format!("{END} {BEGIN}")).unwrap();
        assert!(check(&path).unwrap_err().to_string().contains("markers"));
        assert!(check(&folder.path().join("none.md")).is_err());
    }
}
