//! `flowtape check`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use flowtape_trainer::builtin;
use flowtape_trainer::check::{Check, Depth};

use crate::recipes;
use crate::terminal::{out, say};

/// What to check.
#[derive(Args)]
pub struct CheckArgs {
    /// The recipe: a file, or the name of one that `flowtape recipes` lists, such as digits.
    recipe: PathBuf,
    /// Override a key of the recipe, such as optimizer.lr=1e-4; may be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Where it would be trained; the recipe's own device by default.
    #[arg(long)]
    device: Option<String>,
    /// Ranks that train together, as a launcher would start them: what is told is for one of them.
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    world_size: u16,
    /// Read all samples, not a handful.
    #[arg(long)]
    deep: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Says what a recipe would take. It ends with 1 where that is more than there is.
pub fn run(args: &CheckArgs) -> Result<ExitCode> {
    let mut recipe = recipes::load(&args.recipe, &args.set)?;
    recipe.device = args.device.clone().unwrap_or(recipe.device);
    let device = flowtape_gpu::device(&recipe.device)?;
    let depth = if args.deep { Depth::All } else { Depth::Handful };
    let data = builtin::data(&recipe.data, &device)?;
    let check = Check::on_ranks(&recipe, &device, data, depth, usize::from(args.world_size))?;
    if args.json {
        say!("{}", serde_json::to_string(&check)?);
    } else {
        out(format_args!("{check}"));
    }
    Ok(if check.fits() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
