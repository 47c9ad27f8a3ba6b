//! What a run goes on with that is other than before.

use std::fmt;

use flowtape_data::Fingerprint;
use serde_json::Value;

use crate::Recipe;

/// Keys and sections that may change from one part of a run to the next: how far it goes, where it runs, what is shown and
/// kept of it. All others change what is trained.
const FREE: &[&str] = &[
    "name",
    "run_dir",
    "device",
    "data.num_workers",
    "step_scheduler.max_steps",
    "step_scheduler.num_epochs",
    "step_scheduler.ckpt_every_steps",
    "step_scheduler.save_checkpoint_every_epoch",
    "peft.quantize_cache_dir",
    "performance",
    "fsdp",
    "checkpoint",
    "validation.every_steps",
    "sampling",
    "report",
];

/// Something that is other than it was.
#[derive(Clone, PartialEq, Debug)]
pub struct Change {
    /// The key of the recipe, such as `optimizer.lr`.
    pub key: String,
    /// What it was; null where there was nothing.
    pub before: Value,
    /// What it is.
    pub after: Value,
}

impl Change {
    /// Keys of a recipe (as [`Recipe::to_json`] writes it) that changed and that change what is trained.
    pub fn between(before: &Value, after: &Value) -> Vec<Self> {
        let mut changes = Vec::new();
        collect(String::new(), before, after, &mut changes);
        changes.retain(|change| {
            let within =
                |free: &&str| change.key.strip_prefix(free).is_some_and(|r| r.is_empty() || r.starts_with('.'));
            !FREE.iter().any(within)
        });
        changes
    }

    /// The same, and the data.
    pub fn of_run(before: (&Value, Fingerprint), after: (&Recipe, Fingerprint)) -> Vec<Self> {
        let mut changes = Self::between(before.0, &after.0.to_json());
        if before.1 != after.1 {
            let text = |data: Fingerprint| Value::String(data.to_string());
            changes.push(Self { key: "the data's fingerprint".into(), before: text(before.1), after: text(after.1) });
        }
        changes
    }
}

fn collect(key: String, before: &Value, after: &Value, changes: &mut Vec<Change>) {
    match (before, after) {
        (Value::Object(a), Value::Object(b)) => {
            let keys = a.keys().chain(b.keys().filter(|key| !a.contains_key(*key)));
            for name in keys {
                let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                collect(key, a.get(name).unwrap_or(&Value::Null), b.get(name).unwrap_or(&Value::Null), changes);
            }
        }
        _ if before == after => {}
        _ => changes.push(Change { key, before: before.clone(), after: after.clone() }),
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is {} instead of {}", self.key, self.after, self.before)
    }
}

/// Changes as a list.
pub(crate) fn listed(changes: &[Change]) -> String {
    changes.iter().map(Change::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_changes_training_is_named_by_its_key() {
        let before = json!({
            "device": "cpu", "optimizer": { "lr": 0.1, "betas": [0.9, 0.99] }, "data": { "num_workers": 2 }, "report": null,
            "performance": { "check_loss": true }, "step_scheduler": { "max_steps": 5, "local_batch_size": 4 },
        });
        assert!(Change::between(&before, &before).is_empty());
        let after = json!({
            "device": "cuda", "optimizer": { "lr": 0.2, "betas": [0.9, 0.999] }, "data": { "num_workers": 0 },
            "report": { "samples_per_class": 3 }, "performance": { "check_loss": false }, "devices": 2,
            "step_scheduler": { "max_steps": 9, "local_batch_size": 4 },
        });
        let mut found = Change::between(&before, &after);
        found.sort_by(|a, b| a.key.cmp(&b.key));
        let expected = "devices is 2 instead of null, optimizer.betas is [0.9,0.999] instead of [0.9,0.99], \
                        optimizer.lr is 0.2 instead of 0.1";
        assert_eq!(listed(&found), expected);
    }
}
