//! Tasks of a queue, page by page.

use crate::http::error::ApiError;
use crate::http::query::parameters;
use tidemill_store::label::{LabelError, Labels, Queue, Task, TaskState};
use uuid::Uuid;

/// Which tasks.
#[derive(Debug, PartialEq, Eq)]
pub struct TaskPage {
    after: Option<Uuid>,
    limit: u32,
    state: TaskState,
}

impl TaskPage {
    /// Of `?state=any|open|done&after=ID&limit=N`. Without a limit there are `limit` tasks, with one from 1 to `most`.
    pub fn of(query: Option<&str>, limit: u32, most: u32) -> Result<Self, ApiError> {
        let mut page = Self { after: None, limit, state: TaskState::Any };
        for parameter in parameters(query, &["state", "after", "limit"])? {
            match parameter.name.as_ref() {
                "state" => {
                    let states = [("any", TaskState::Any), ("open", TaskState::Open), ("done", TaskState::Done)];
                    page.state = parameter.one_of(&states)?;
                }
                "after" => page.after = Some(parameter.parse("the id of a task")?),
                _ => page.limit = parameter.number(1..=most)?,
            }
        }
        Ok(page)
    }

    /// The tasks, and whether there are more behind them.
    pub async fn fetch(&self, labels: &Labels, queue: &Queue) -> Result<(Vec<Task>, bool), LabelError> {
        // One more than asked for tells whether there is a next page.
        let mut tasks = labels.list_tasks(queue.id, self.state, self.after, self.limit + 1).await?;
        let more = tasks.len() > self.limit as usize;
        tasks.truncate(self.limit as usize);
        Ok((tasks, more))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_says_what_is_wrong_with_it() {
        let id = Uuid::from_u128(7);
        let page = |query: &str| TaskPage::of(Some(query), 100, 1000);
        let found = page(&format!("limit=5&after={id}&state=open")).unwrap();
        assert_eq!(found, TaskPage { after: Some(id), limit: 5, state: TaskState::Open });
        assert_eq!(page("").unwrap(), TaskPage { after: None, limit: 100, state: TaskState::Any });
        for (query, param) in [
            ("limit=0", "limit"),
            ("limit=1001", "limit"),
            ("limit", "limit"),
            ("after=x", "after"),
            ("state=new", "state"),
            ("x=1", "x"),
        ] {
            assert_eq!(page(query).unwrap_err().param.as_deref(), Some(param), "{query}");
        }
    }
}
