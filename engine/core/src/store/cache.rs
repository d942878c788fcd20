//! A map of bounded weight that forgets what was not used for longest, about (second chance).

use std::hash::Hash;

use super::index::KeyMap;

struct Slot<K, V> {
    key: K,
    value: V,
    weight: usize,
    used: bool,
}

/// Keeps values up to a total weight; at least one is always kept.
pub struct Cache<K, V> {
    places: KeyMap<K, usize>,
    slots: Vec<Slot<K, V>>,
    hand: usize,
    weight: usize,
    weight_max: usize,
}

impl<K: Hash + Eq + Copy, V> Cache<K, V> {
    pub fn new(weight_max: usize) -> Cache<K, V> {
        let (places, slots) = (KeyMap::default(), Vec::new());
        Cache { places, slots, hand: 0, weight: 0, weight_max }
    }

    pub fn get(&mut self, key: &K) -> Option<&V> {
        let slot = &mut self.slots[*self.places.get(key)?];
        slot.used = true;
        Some(&slot.value)
    }

    /// Keeps `value`, and forgets others where the weight is too much.
    pub fn insert(&mut self, key: K, value: V, weight: usize) {
        self.remove(&key);
        while self.weight + weight > self.weight_max && !self.slots.is_empty() {
            self.forget_one();
        }
        self.weight += weight;
        self.places.insert(key, self.slots.len());
        self.slots.push(Slot { key, value, weight, used: true });
    }

    /// Replaces a value that is there; one that is not stays away.
    pub fn refresh(&mut self, key: &K, value: V, weight: usize) {
        if self.places.contains_key(key) {
            self.insert(*key, value, weight);
        }
    }

    pub fn remove(&mut self, key: &K) {
        if let Some(place) = self.places.get(key) {
            self.remove_at(*place);
        }
    }

    pub fn retain(&mut self, keep: impl Fn(&K) -> bool) {
        let gone: Vec<K> = self.places.keys().filter(|key| !keep(key)).copied().collect();
        gone.iter().for_each(|key| self.remove(key));
    }

    fn forget_one(&mut self) {
        loop {
            self.hand = if self.hand + 1 < self.slots.len() { self.hand + 1 } else { 0 };
            let slot = &mut self.slots[self.hand];
            if !slot.used {
                return self.remove_at(self.hand);
            }
            slot.used = false;
        }
    }

    fn remove_at(&mut self, place: usize) {
        let slot = self.slots.swap_remove(place);
        self.weight -= slot.weight;
        self.places.remove(&slot.key);
        if let Some(moved) = self.slots.get(place) {
            self.places.insert(moved.key, place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_over_its_weight_forgets_what_was_not_used() {
        let mut cache = Cache::new(10);
        (0..10u32).for_each(|key| cache.insert(key, key, 1));
        for key in 10..1000 {
            assert_eq!(cache.get(&3), Some(&3), "at {key}");
            cache.insert(key, key, 1);
            assert!(cache.weight <= 10 && cache.slots.len() == cache.places.len());
        }
        cache.retain(|key| *key == 3);
        assert_eq!(cache.get(&3), Some(&3));
        assert_eq!(cache.get(&999), None);
    }
}
