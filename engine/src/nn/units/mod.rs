//! Blocks whose parameters are kept elsewhere, and come while their block is computed with.
//!
//! | file | who keeps them |
//! |---|---|
//! | `ranks` | each parameter one rank of a group |
//! | `host` | the host's memory |

mod host;
mod ranks;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::host::Swapped;
use self::ranks::Shared;
pub(crate) use self::ranks::share_out;
use super::param::WeakParam;
use super::{Param, Role};
use crate::comm::Work;
use crate::{Error, Result, Tensor};

/// The units of a model that are kept elsewhere: parameters of a block, but those of adapters.
///
/// A block comes when something asks for one of its parameters' values, in forward or in backward, and goes when another one comes.
/// What came behind what is remembered: the block that came behind the last two before is sent for while the present one is computed
/// with.
#[derive(Debug)]
pub struct Units {
    keeper: Keeper,
    state: Mutex<State>,
}

/// Who keeps them.
#[derive(Debug)]
enum Keeper {
    Ranks(Shared),
    Host(Swapped),
}

/// Where a parameter of a block is kept.
#[derive(Clone, Debug)]
pub(crate) struct Home {
    pub units: Arc<Units>,
    /// Which block.
    pub unit: usize,
    /// The rank of the group that has it; of what the host keeps, the first.
    pub owner: usize,
}

impl Home {
    /// Whether this rank has it.
    pub fn is_own(&self) -> bool {
        match &self.units.keeper {
            Keeper::Ranks(shared) => self.owner == shared.rank(),
            Keeper::Host(_) => true,
        }
    }

    /// Whether the host keeps it, for a device of another memory.
    pub fn is_host(&self) -> bool {
        matches!(self.units.keeper, Keeper::Host(_))
    }

    /// Whether it is on the device while its block is computed with, and else not.
    fn comes_and_goes(&self) -> bool {
        self.is_host() || !self.is_own()
    }
}

#[derive(Debug, Default)]
struct State {
    /// Blocks by their paths, in the order in which they were made.
    places: HashMap<Arc<str>, usize>,
    units: Vec<Vec<WeakParam>>,
    /// The block that is here, and the one before it.
    here: Option<usize>,
    before: Option<usize>,
    /// The one that was sent for.
    coming: Option<(usize, Coming)>,
    /// What came behind the last two.
    behind: HashMap<(Option<usize>, usize), usize>,
}

/// Parameters of a block on their way.
#[derive(Debug, Default)]
struct Coming {
    /// What those that come have once all work is done: values, or codes as words.
    values: Vec<(Param, Tensor)>,
    works: Vec<Box<dyn Work>>,
    /// What this rank gives others, until they have it.
    given: Vec<Tensor>,
}

impl Coming {
    /// Waits for them. Nobody writes to their memory from then on.
    fn wait(self) -> Result<Vec<(Param, Tensor)>> {
        self.works.into_iter().try_for_each(|work| work.wait())?;
        Ok(self.values)
    }
}

impl Units {
    fn of(keeper: Keeper) -> Arc<Self> {
        Arc::new(Self { keeper, state: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a parameter of a block is kept, if elsewhere.
    pub(super) fn home(self: &Arc<Self>, block: &Arc<str>, path: &str, role: Role) -> Option<Home> {
        let owner = match &self.keeper {
            Keeper::Ranks(shared) => shared.owner(path)?,
            Keeper::Host(swapped) => swapped.has(block, role).then_some(0)?,
        };
        let mut state = self.lock();
        let next = state.units.len();
        let unit = *state.places.entry(block.clone()).or_insert(next);
        if unit == next {
            state.units.push(Vec::new());
        }
        Some(Home { units: self.clone(), unit, owner })
    }

    /// Takes a parameter into its block.
    pub(super) fn add(&self, unit: usize, param: &Param) {
        let mut state = self.lock();
        if state.here == Some(unit) {
            // What is asked for while a model is made: the rest of its block is not there yet.
            state.leave();
        }
        if let Some(members) = state.units.get_mut(unit) {
            members.push(param.downgrade());
        }
    }

    /// Sees that a block's parameters are here.
    pub(super) fn arrive(&self, unit: usize) -> Result<()> {
        let mut state = self.lock();
        if state.here == Some(unit) {
            return Ok(());
        }
        let (before, here) = (state.before, state.here);
        state.leave();
        let coming = match state.coming.take() {
            Some((next, coming)) if next == unit => coming,
            other => {
                other.map_or(Ok(Vec::new()), |(_, coming)| coming.wait())?;
                self.send_for(&state, unit)?
            }
        };
        coming.wait()?.into_iter().try_for_each(|(param, value)| param.take(&value))?;
        if let Some(here) = here {
            state.behind.insert((before, here), unit);
        }
        (state.before, state.here) = (here, Some(unit));
        if let Some(&next) = state.behind.get(&(here, unit)).filter(|next| **next != unit) {
            state.coming = Some((next, self.send_for(&state, next)?));
        }
        Ok(())
    }

    /// Begins to bring a block's parameters.
    fn send_for(&self, state: &State, unit: usize) -> Result<Coming> {
        let gone = || Error::argument("a block's parameters", "a model that is there", "one that is gone");
        let members = state.units.get(unit).into_iter().flatten();
        let members = members.map(|param| param.upgrade().ok_or_else(gone)).collect::<Result<Vec<_>>>()?;
        match &self.keeper {
            Keeper::Ranks(shared) => shared.send_for(&members),
            Keeper::Host(_) => host::send_for(members),
        }
    }

    /// Lets go what came: parameters were written. Where ranks keep them, all of them call it together.
    ///
    /// # Errors
    /// When a rank has failed.
    pub fn forget(&self) -> Result<()> {
        let mut state = self.lock();
        state.leave();
        (state.here, state.before) = (None, None);
        state.coming.take().map_or(Ok(()), |(_, coming)| coming.wait().map(drop))
    }
}

impl State {
    /// Lets the block go that is here.
    fn leave(&mut self) {
        let Some(here) = self.here.take() else { return };
        let members = self.units.get(here).into_iter().flatten().filter_map(WeakParam::upgrade);
        members.filter(|param| param.home().is_some_and(Home::comes_and_goes)).for_each(|param| param.let_go());
    }
}
